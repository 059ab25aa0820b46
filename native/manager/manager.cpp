// The functions of pagemgr_manager.h; what they mean is defined by pagemgr/steps.py and pagemgr/prefix.py.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "sha256.hpp"

#pragma GCC visibility push(default)
extern "C" {
#include "../pagemgr_manager.h"
}
#pragma GCC visibility pop

namespace {

using pagemgr::kDigestBytes;

enum BlockState : uint8_t { kNull, kFree, kOpen, kFull, kCached, kFenced };

// Where the name is, or the empty slot where it belongs. Names are digests: any of their bits are a hash.
int64_t find(const pagemgr_index &m, const uint8_t *name) {
    uint64_t hash;
    std::memcpy(&hash, name, sizeof hash);
    for (int64_t slot = hash & m.mask;; slot = (slot + 1) & m.mask)
        if (m.slots[slot] < 0 || !std::memcmp(m.names + int64_t{m.slots[slot]} * kDigestBytes, name, kDigestBytes))
            return slot;
}

int32_t publish(pagemgr_index &m, int32_t block, const uint8_t *name) {
    const int64_t slot = find(m, name);
    if (m.slots[slot] < 0) {
        m.slots[slot] = block;
        std::memcpy(m.names + int64_t{block} * kDigestBytes, name, kDigestBytes);
    }
    return m.slots[slot];
}

// The place of PrefixIndex.heads for what follows a name and begins with a token.
int64_t head_of(const pagemgr_index &m, const uint8_t *parent, int32_t token) {
    uint64_t digest;
    std::memcpy(&digest, parent, sizeof digest);
    return static_cast<int64_t>(digest ^ static_cast<uint64_t>(token) * 0x9E3779B97F4A7C15u) & m.heads_mask;
}

bool lives(const pagemgr_manager &m, int64_t row, int64_t generation) {
    return row >= 0 && row < m.num_rows && m.live[row] && m.generation[row] == generation;
}

int64_t blocks_for(const pagemgr_manager &m, int64_t tokens) { return (tokens + m.block_size - 1) / m.block_size; }

}  // namespace

int32_t pagemgr_manager_version() { return PAGEMGR_MANAGER_VERSION; }

int32_t pagemgr_manager_measure(const pagemgr_manager *manager, pagemgr_manager_step *step) {
    const pagemgr_manager &m = *manager;
    int64_t tokens = 0, fresh = 0, copies = 0, width = 0;
    for (int64_t i = 0; i < step->num_seqs; ++i) {
        const int64_t row = step->rows[i];
        if (!lives(m, row, step->generations[i]) || m.tier[row] != 0 || m.last_step[row] < 0) return 0;
        const int64_t start = m.reserved[row], end = start + step->counts[i];
        if (step->counts[i] < 1 || end > m.max_seq_len) return 0;
        if (start % m.block_size) {
            const int32_t tail = m.blocks[row * m.width + start / m.block_size];
            if (m.state[tail] == kFull)
                ++copies;
            else if (m.state[tail] != kOpen || m.refs[tail] != 1 || m.pending[tail] != 0)
                return 0;
        }
        const int64_t needed = blocks_for(m, end);
        tokens += step->counts[i];
        fresh += needed - m.num_blocks[row];
        width = std::max(width, needed);
    }
    step->num_tokens = tokens;
    step->num_new_blocks = fresh + copies;
    step->num_copies = copies;
    step->table_width = width;
    return 1;
}

void pagemgr_manager_reserve(pagemgr_manager *manager, pagemgr_manager_step *step, int64_t num_free) {
    pagemgr_manager &m = *manager;
    const int32_t *next = m.stack + num_free;
    int64_t token = 0, copies = 0;
    for (int64_t i = 0; i < step->num_seqs && copies < step->num_copies; ++i) {
        const int64_t row = step->rows[i], start = m.reserved[row];
        int32_t &tail = m.blocks[row * m.width + start / m.block_size];
        if (start % m.block_size == 0 || m.state[tail] != kFull) continue;
        const int32_t block = *--next;
        m.refs[block] = 1;
        m.state[block] = kOpen;
        std::memcpy(m.tokens + int64_t{block} * m.block_size, m.tokens + int64_t{tail} * m.block_size,
                    m.block_size * sizeof *m.tokens);
        step->copied[copies] = i;
        step->fresh[copies] = block;
        step->tails[copies++] = tail;
        tail = block;
    }
    for (int64_t i = 0; i < step->num_seqs; ++i) {
        const int64_t row = step->rows[i], start = m.reserved[row], end = start + step->counts[i];
        int32_t *const blocks = m.blocks + row * m.width;
        const int64_t needed = blocks_for(m, end);
        for (int64_t column = m.num_blocks[row]; column < needed; ++column) {
            const int32_t block = *--next;
            m.refs[block] = 1;
            m.state[block] = kOpen;
            blocks[column] = block;
        }
        step->starts[i] = start;
        step->previous[i] = m.last_step[row];
        step->query_start[i] = static_cast<int32_t>(token);
        m.num_blocks[row] = needed;
        m.reserved[row] = end;
        m.last_step[row] = step->step;
        int32_t *const out = step->block_table + i * step->table_width;
        std::memcpy(out, blocks, needed * sizeof *blocks);
        std::fill(out + needed, out + step->table_width, 0);
        for (int64_t position = start; position < end; ++position)
            step->slot_mapping[token++] =
                int64_t{blocks[position / m.block_size]} * m.block_size + position % m.block_size;
    }
    step->query_start[step->num_seqs] = static_cast<int32_t>(token);
}

int64_t pagemgr_manager_commit(
    pagemgr_manager *manager, const pagemgr_manager_step *step, const int32_t *ids, int64_t *duplicates,
    int32_t *sealed, int64_t *num_sealed) {
    pagemgr_manager &m = *manager;
    const int64_t size = m.block_size;
    int64_t found = 0, published = 0;
    std::vector<int32_t> tokens(size);
    uint8_t name[kDigestBytes];
    for (int64_t i = 0; i < step->num_seqs; ++i) {
        const int64_t row = step->rows[i], begin = step->query_start[i], end = step->query_start[i + 1];
        if (!lives(m, row, step->generations[i])) continue;
        const bool named = m.committed[row] == m.computed[row];
        m.computed[row] += end - begin;
        if (m.last_step[row] == step->step) m.last_step[row] = 0;
        if (!ids || !named || ids[begin] < 0) continue;
        for (int64_t t = begin; t < end; ++t) m.tokens[step->slot_mapping[t]] = ids[t];
        const int64_t first = m.committed[row] / size;
        m.committed[row] += end - begin;
        int32_t *const blocks = m.blocks + row * m.width;
        const bool held = first > m.dropped[row];
        int32_t before = held && !m.window[row] ? blocks[first - 1] : 0;
        const uint8_t *parent = held ? m.index.names + int64_t{blocks[first - 1]} * kDigestBytes : m.roots + row * kDigestBytes;
        for (int64_t column = first; column < m.committed[row] / size; ++column) {
            const int32_t own = blocks[column];
            pagemgr::hash_chain(parent, m.tokens + own * size, 1, m.block_size, name);
            const int32_t kept = publish(m.index, own, name);
            if (kept == own) {
                m.state[own] = kFull;
                m.published[own] = 1;
                m.index.parents[own] = before;
                m.index.heads[head_of(m.index, parent, m.tokens[own * size])] = own;
                m.index.groups[own] = static_cast<uint8_t>(row / m.max_sequences);
                sealed[published++] = own;
            } else {
                int64_t *const entry = duplicates + 4 * found++;
                entry[0] = row, entry[1] = column, entry[2] = own, entry[3] = kept;
            }
            if (!m.window[row]) before = kept;
            parent = m.index.names + int64_t{kept} * kDigestBytes;
        }
    }
    *num_sealed = published;
    return found;
}

int64_t pagemgr_manager_free(
    pagemgr_manager *manager, const int64_t *rows, const int64_t *generations, int64_t num_seqs, int64_t num_free,
    int32_t *cached, int64_t *released) {
    pagemgr_manager &m = *manager;
    for (int64_t i = 0; i < num_seqs; ++i) {
        const int64_t row = rows[i];
        if (!lives(m, row, generations[i]) || m.tier[row] != 0 || m.last_step[row] != 0) return -1;
        for (int64_t column = m.dropped[row]; column < m.num_blocks[row]; ++column)
            if (m.refs[m.blocks[row * m.width + column]] < 1) return -1;
    }
    int64_t num_cached = 0;
    released[0] = released[1] = 0;
    for (int64_t i = 0; i < num_seqs; ++i) {
        const int64_t row = rows[i];
        int32_t *const blocks = m.blocks + row * m.width;
        for (int64_t column = m.num_blocks[row] - 1; column >= m.dropped[row]; --column) {
            const int32_t block = blocks[column];
            blocks[column] = 0;
            if (--m.refs[block] > 0) continue;
            if (m.published[block]) {
                m.state[block] = kCached;
                cached[num_cached++] = block;
                ++released[1];
            } else {
                m.state[block] = kFree;
                m.stack[num_free++] = block;
                ++released[0];
            }
        }
        m.num_blocks[row] = m.dropped[row] = m.reserved[row] = m.computed[row] = m.committed[row] = 0;
        m.live[row] = 0;
        ++m.generation[row];
    }
    return num_cached;
}

int32_t pagemgr_manager_fork(
    pagemgr_manager *manager, const int64_t *parents, int64_t num_groups, const int64_t *children, int64_t n) {
    pagemgr_manager &m = *manager;
    for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t row = parents[g];
        if (!m.live[row] || m.tier[row] != 0 || m.last_step[row] != 0) return 0;
        for (int64_t column = m.dropped[row]; column < m.num_blocks[row]; ++column)
            if (m.refs[m.blocks[row * m.width + column]] > INT32_MAX - n) return 0;
    }
    for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t row = parents[g], used = m.num_blocks[row];
        const int32_t *const blocks = m.blocks + row * m.width;
        for (int64_t column = m.dropped[row]; column < used; ++column) m.refs[blocks[column]] += static_cast<int32_t>(n);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t child = children[g * n + i];
            std::memcpy(m.blocks + child * m.width, blocks, used * sizeof *blocks);
            std::memcpy(m.roots + child * kDigestBytes, m.roots + row * kDigestBytes, kDigestBytes);
            for (int64_t *column : {m.num_blocks, m.dropped, m.reserved, m.computed, m.committed})
                column[child] = column[row];
            m.tier[child] = 0;
            m.live[child] = 1;
        }
    }
    return 1;
}

void pagemgr_manager_hash(
    const uint8_t *parent, const int32_t *tokens, int64_t num_blocks, int32_t block_size, uint8_t *names) {
    pagemgr::hash_chain(parent, tokens, num_blocks, block_size, names);
}

void pagemgr_index_find(const pagemgr_index *index, const uint8_t *names, int64_t count, int32_t *blocks) {
    for (int64_t i = 0; i < count; ++i) blocks[i] = index->slots[find(*index, names + i * kDigestBytes)];
}

void pagemgr_index_publish(
    pagemgr_index *index, const int32_t *blocks, const uint8_t *names, int64_t count, int32_t *kept) {
    for (int64_t i = 0; i < count; ++i) kept[i] = publish(*index, blocks[i], names + i * kDigestBytes);
}

void pagemgr_index_forget(pagemgr_index *index, const int32_t *blocks, int64_t count) {
    pagemgr_index &m = *index;
    for (int64_t i = 0; i < count; ++i) {
        // Close the gap that the name leaves, so that every name stays reachable from where its probe starts.
        int64_t gap = find(m, m.names + int64_t{blocks[i]} * kDigestBytes);
        for (int64_t slot = (gap + 1) & m.mask; m.slots[slot] >= 0; slot = (slot + 1) & m.mask) {
            uint64_t hash;
            std::memcpy(&hash, m.names + int64_t{m.slots[slot]} * kDigestBytes, sizeof hash);
            const int64_t home = hash & m.mask;
            if (((slot - home) & m.mask) >= ((slot - gap) & m.mask)) {
                m.slots[gap] = m.slots[slot];
                gap = slot;
            }
        }
        m.slots[gap] = -1;
    }
}
