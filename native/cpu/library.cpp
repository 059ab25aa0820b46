// The functions of pagemgr_abi.h: arguments are checked here, then the kernels of the best instruction set run.
#if defined(PAGEMGR_HAS_amx)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.hpp"

namespace pagemgr {
namespace {

thread_local const char *message = "";

int32_t refuse(pagemgr_status status, const char *why) {
    message = why;
    return status;
}

#if defined(PAGEMGR_HAS_amx)
// The registers of matrix tiles are large: Linux gives them to processes that ask.
bool may_use_tiles() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Kernels choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#if defined(PAGEMGR_HAS_amx)
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-bf16") && may_use_tiles())
        return amx::kernels;
#endif
#if defined(PAGEMGR_HAS_avx512)
    if (avx512) return avx512::kernels;
#endif
#if defined(PAGEMGR_HAS_avx2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return avx2::kernels;
#endif
    return portable::kernels;
}

const Kernels kernels = choose();

bool known(int32_t dtype) { return dtype >= PAGEMGR_FLOAT32 && dtype <= PAGEMGR_BFLOAT16; }

int32_t check(const pagemgr_run &run) {
    return run.num_threads < 1 ? refuse(PAGEMGR_INVALID, "run.num_threads must be at least 1") : PAGEMGR_OK;
}

int32_t check(const pagemgr_kv &kv) {
    if (!known(kv.dtype)) return refuse(PAGEMGR_UNSUPPORTED, "kv.dtype must be float32, float16 or bfloat16");
    if (kv.kv_dtype < PAGEMGR_KV_PLAIN || kv.kv_dtype > PAGEMGR_KV_INT8)
        return refuse(PAGEMGR_UNSUPPORTED, "kv.kv_dtype must be plain, float8_e4m3fn, float8_e5m2 or int8");
    if (kv.kv_dtype != PAGEMGR_KV_PLAIN && !(kv.key_scale && kv.value_scale))
        return refuse(PAGEMGR_INVALID, "kv.key_scale and value_scale must be given for a quantised pool");
    if (kv.num_kv_heads < 1 || kv.block_size < 1 || kv.head_dim < 1)
        return refuse(PAGEMGR_INVALID, "kv.num_kv_heads, block_size and head_dim must be at least 1");
    return PAGEMGR_OK;
}

int32_t check(const pagemgr_attention_args &args) {
    if (int32_t status = check(args.run)) return status;
    if (int32_t status = check(args.kv)) return status;
    if (args.num_q_heads < 1 || args.num_q_heads % args.kv.num_kv_heads)
        return refuse(PAGEMGR_INVALID, "num_q_heads must be a multiple of kv.num_kv_heads");
    if (args.num_seqs < 0 || args.num_tokens < 0 || args.max_query_len < 0 || args.max_seq_len < 0 || args.window < 0)
        return refuse(PAGEMGR_INVALID, "counts, lengths and the window must not be negative");
    return PAGEMGR_OK;
}

}  // namespace
}  // namespace pagemgr

using namespace pagemgr;

int32_t pagemgr_abi_version(void) { return PAGEMGR_ABI_VERSION; }

int64_t pagemgr_struct_size(int32_t which) { return struct_size(which); }

const char *pagemgr_message(void) { return message; }

int32_t pagemgr_get_capabilities(pagemgr_capabilities *capabilities) {
    *capabilities = pagemgr_capabilities{};
    for (int i = 0; kernels.variant[i]; i++) capabilities->variant[i] = kernels.variant[i];
    capabilities->device = PAGEMGR_CPU;
    capabilities->dtypes = 1 << PAGEMGR_FLOAT32 | 1 << PAGEMGR_FLOAT16 | 1 << PAGEMGR_BFLOAT16;
    capabilities->kv_dtypes = 1 << PAGEMGR_KV_FLOAT8_E4M3FN | 1 << PAGEMGR_KV_FLOAT8_E5M2 | 1 << PAGEMGR_KV_INT8;
    capabilities->features = PAGEMGR_CAUSAL | PAGEMGR_NON_CAUSAL | PAGEMGR_SLIDING_WINDOW | PAGEMGR_SOFTCAP |
                             PAGEMGR_ALIBI | PAGEMGR_SINKS | PAGEMGR_LSE;
    return PAGEMGR_OK;
}

int32_t pagemgr_attention_workspace(const pagemgr_attention_args *args, int64_t *bytes) {
    if (int32_t status = check(*args)) return status;
    *bytes = kernels.attention_workspace(*args);
    return PAGEMGR_OK;
}

int32_t pagemgr_write_kv(const pagemgr_write_kv_args *args) {
    if (int32_t status = check(args->run)) return status;
    if (int32_t status = check(args->kv)) return status;
    if (args->kv.kv_dtype == PAGEMGR_KV_PLAIN) write_kv(*args);
    else kernels.quantise(*args);
    return PAGEMGR_OK;
}

int32_t pagemgr_attention(const pagemgr_attention_args *args) {
    if (int32_t status = check(*args)) return status;
    if (args->workspace_bytes < kernels.attention_workspace(*args))
        return refuse(PAGEMGR_INVALID, "the workspace is smaller than pagemgr_attention_workspace says");
    kernels.attention(*args);
    return PAGEMGR_OK;
}

int32_t pagemgr_copy_blocks(const pagemgr_copy_blocks_args *args) {
    if (int32_t status = check(args->run)) return status;
    copy_blocks(*args);
    return PAGEMGR_OK;
}

int32_t pagemgr_merge(const pagemgr_merge_args *args) {
    if (int32_t status = check(args->run)) return status;
    if (!known(args->dtype)) return refuse(PAGEMGR_UNSUPPORTED, "dtype must be float32, float16 or bfloat16");
    if (args->num_parts < 1) return refuse(PAGEMGR_INVALID, "num_parts must be at least 1");
    kernels.merge(*args);
    return PAGEMGR_OK;
}
