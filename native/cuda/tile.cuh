// The instructions that move and multiply tiles: cp.async, ldmatrix, mma (sm_80 and later).
//
// Fragments of mma.m16n8k16, for lane = 4 * g + t:  A (16 × 16, rows g and g + 8), B (16 × 8, column g),
// C (16 × 8): c[0], c[1] at row g, columns 2t and 2t + 1; c[2], c[3] at row g + 8.
#pragma once

#include "library.cuh"

namespace pagemgr {

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory.
__device__ __forceinline__ void copy_16_async(uint32_t target, const void *source) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// The same; zeros, and nothing is read, unless `valid`.
__device__ __forceinline__ void copy_16_or_zero_async(uint32_t target, const void *source, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all committed copies of this thread have arrived.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Four 8 × 8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}

// The first two; lanes 0 to 15 give the addresses.
__device__ __forceinline__ void load_two_matrices(uint32_t (&m)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(m[0]), "=r"(m[1])
                 : "r"(address)
                 : "memory");
}

// Four, each transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}

// c += a × b
template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// What a quantised pool holds: 8 bits, of which the arithmetic is done in the type of the queries.
struct E4m3 {
    uint8_t bits;
};

// Four of them as two pairs of halves.
__device__ __forceinline__ void widen_to_half(uint32_t four, uint32_t &low, uint32_t &high) {
#if __CUDA_ARCH__ >= 890
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b; }"
        : "=r"(low), "=r"(high)
        : "r"(four));
#else
    const auto shifted = [](uint32_t bytes) {  // each at the top of a half, where their exponents are 15 - 7 too small
        const uint32_t bits = (bytes & 0x80008000) | (bytes & 0x7f007f00) >> 1;
        const __half2 pair = __hmul2(reinterpret_cast<const __half2 &>(bits), __float2half2_rn(256));
        return reinterpret_cast<const uint32_t &>(pair);
    };
    low = shifted(__byte_perm(four, 0, 0x1404)), high = shifted(__byte_perm(four, 0, 0x3424));
#endif
}

// Four of them as two pairs of T, exactly.
template <typename T> __device__ __forceinline__ void widen(uint32_t four, uint32_t &low, uint32_t &high) {
    widen_to_half(four, low, high);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const float2 a = __half22float2(reinterpret_cast<const __half2 &>(low));
        const float2 b = __half22float2(reinterpret_cast<const __half2 &>(high));
        low = pack<T>(a.x, a.y), high = pack<T>(b.x, b.y);
    }
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void fetch_to_l2(const void *source) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(source));
}

// mbarriers in shared memory: a phase ends when `count` arrivals and all announced bytes are there.
__device__ __forceinline__ void init_barrier(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive_at(uint32_t barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait_at(uint32_t barrier, int parity) {
#if __CUDA_ARCH__ >= 900
#define PAGEMGR_WAIT "mbarrier.try_wait.parity.shared.b64"
#else
#define PAGEMGR_WAIT "mbarrier.test_wait.parity.shared.b64"
#endif
    asm volatile("{ .reg .pred done; again%=: " PAGEMGR_WAIT " done, [%0], %1; @!done bra again%=; }" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
#undef PAGEMGR_WAIT
}

// The calling warps of a CTA, `threads` in all, wait for each other at named barrier 1.
template <int Threads> __device__ __forceinline__ void meet() {
    asm volatile("bar.sync 1, %0;" ::"n"(Threads) : "memory");
}

// The same; whether the condition holds for all of them.
template <int Threads> __device__ __forceinline__ bool meet_and(bool condition) {
    int all;
    asm volatile("{ .reg .pred p, q; setp.ne.s32 p, %1, 0; bar.red.and.pred q, 1, %2, p; selp.s32 %0, 1, 0, q; }"
                 : "=r"(all)
                 : "r"(static_cast<int>(condition)), "n"(Threads)
                 : "memory");
    return all;
}

// This thread arrives once all its copy_16_async so far are done.
__device__ __forceinline__ void arrive_after_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// How the L2 treats what is read: data that nobody reads again makes room first.
__device__ __forceinline__ uint64_t read_once() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ uint64_t read_again() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// A contiguous run of global memory, a multiple of 16 bytes, into shared memory; tells the barrier.
__device__ __forceinline__ void copy_bulk(uint32_t target, const void *source, int bytes, uint32_t barrier,
                                          uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
        "%4;" ::"r"(target),
        "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

// What this thread wrote to shared memory comes before later bulk copies and wgmma.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

}  // namespace pagemgr
