// SHA-256 (FIPS 180-4) of a chain of equal-sized messages: each is the digest before it and the tokens of one block.
#pragma once

#include <cstdint>

namespace pagemgr {

constexpr int kDigestBytes = 32;

// names[i] = SHA-256(names[i - 1], the i-th block_size tokens), with parent before the first. names: [num_blocks, 32].
void hash_chain(const uint8_t *parent, const int32_t *tokens, int64_t num_blocks, int32_t block_size, uint8_t *names);

}  // namespace pagemgr
