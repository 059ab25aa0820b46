// pagemgr_abi.h for C++ and CUDA: with what it needs before it, its functions visible outside a library that hides
// everything else, and those of them that say what the library was compiled with.
#pragma once

#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {
#include "pagemgr_abi.h"
}
#pragma GCC visibility pop

namespace pagemgr {

// What pagemgr_struct_size gives. Not inline alone: the library shows no symbol but those of the header.
static inline int64_t struct_size(int32_t which) {
    switch (which) {
        case PAGEMGR_STRUCT_CAPABILITIES: return sizeof(pagemgr_capabilities);
        case PAGEMGR_STRUCT_WRITE_KV: return sizeof(pagemgr_write_kv_args);
        case PAGEMGR_STRUCT_ATTENTION: return sizeof(pagemgr_attention_args);
        case PAGEMGR_STRUCT_COPY_BLOCKS: return sizeof(pagemgr_copy_blocks_args);
        case PAGEMGR_STRUCT_MERGE: return sizeof(pagemgr_merge_args);
        default: return 0;
    }
}

}  // namespace pagemgr
