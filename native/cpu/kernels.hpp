// What library.cpp calls. The functions in a variant's namespace are compiled once for each instruction set.
#pragma once

#include "../abi.hpp"

namespace pagemgr {

void write_kv(const pagemgr_write_kv_args &args);
void copy_blocks(const pagemgr_copy_blocks_args &args);

struct Kernels {
    const char *variant;
    int64_t (*attention_workspace)(const pagemgr_attention_args &args);
    void (*attention)(const pagemgr_attention_args &args);
    void (*merge)(const pagemgr_merge_args &args);
};

#define PAGEMGR_DECLARE(name)                                                \
    namespace name {                                                         \
    int64_t attention_workspace(const pagemgr_attention_args &args);         \
    void attention(const pagemgr_attention_args &args);                      \
    void merge(const pagemgr_merge_args &args);                              \
    constexpr Kernels kernels{#name, attention_workspace, attention, merge}; \
    }
PAGEMGR_DECLARE(portable)
PAGEMGR_DECLARE(avx2)
PAGEMGR_DECLARE(avx512)
PAGEMGR_DECLARE(amx)
#undef PAGEMGR_DECLARE

}  // namespace pagemgr
