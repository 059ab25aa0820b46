// What library.cpp calls. The functions in a variant's namespace are compiled once for each instruction set.
#pragma once

#include "../abi.hpp"

namespace pagemgr {

// Notes something out of range where the caller looks for it.
static inline void report(const pagemgr_run &run, int32_t error) {
    if (run.errors) __atomic_fetch_or(run.errors, error, __ATOMIC_RELAXED);
}

// Where a new token goes; false if nowhere.
static inline bool find_slot(const pagemgr_write_kv_args &args, int64_t token, int64_t &block, int64_t &offset) {
    const int64_t slot = args.slot_mapping[token];
    block = slot / args.kv.block_size, offset = slot % args.kv.block_size;
    if (slot >= 0 && block < args.kv.num_blocks) return true;
    if (slot != -1) report(args.run, PAGEMGR_BAD_SLOT);
    return false;
}

void write_kv(const pagemgr_write_kv_args &args);
void copy_blocks(const pagemgr_copy_blocks_args &args);

struct Kernels {
    const char *variant;
    void (*quantise)(const pagemgr_write_kv_args &args);  // write_kv for a quantised pool
    int64_t (*attention_workspace)(const pagemgr_attention_args &args);
    void (*attention)(const pagemgr_attention_args &args);
    void (*merge)(const pagemgr_merge_args &args);
};

#define PAGEMGR_DECLARE(name)                                                          \
    namespace name {                                                                   \
    void quantise(const pagemgr_write_kv_args &args);                                  \
    int64_t attention_workspace(const pagemgr_attention_args &args);                   \
    void attention(const pagemgr_attention_args &args);                                \
    void merge(const pagemgr_merge_args &args);                                        \
    constexpr Kernels kernels{#name, quantise, attention_workspace, attention, merge}; \
    }
PAGEMGR_DECLARE(portable)
PAGEMGR_DECLARE(avx2)
PAGEMGR_DECLARE(avx512)
PAGEMGR_DECLARE(amx)
#undef PAGEMGR_DECLARE

}  // namespace pagemgr
