// The instructions of Hopper's tensor cores and copy engine: wgmma, tensor maps, roles for warpgroups (sm_90a).
//
// A tile in shared memory is cut into panels of 64 columns and groups of 8 rows, so that a row of a panel is 128 bytes
// and a panel of a group 1024: in those, 16-byte chunk c of row r lies at chunk c ^ r, which is what a tensor map with
// 128-byte swizzle writes and a descriptor with 128-byte swizzle reads. In which order panels and groups follow each
// other is up to the tile. A tile of keys is read as it lies (its rows are the columns of the product), a tile of
// values transposed.
//
// Fragments of m64nNk16, for warp w of the warpgroup and lane 4 * g + t:  C (64 × N): c[4i], c[4i + 1] at row
// 16w + g, columns 8i + 2t and the next; c[4i + 2], c[4i + 3] at row 16w + g + 8.  A (64 × 16) is mma's for each warp.
#pragma once

#include <cuda.h>

#include "tile.cuh"

namespace pagemgr {

constexpr int PANEL = 64;  // columns
constexpr int GROUP_BYTES = 8 * 2 * PANEL;  // of 8 rows of a panel

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A box of a tensor map into shared memory; tells the barrier. Elements out of the map's bounds become zeros.
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap &map, int x, int y, int z,
                                         uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(target),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap &map, int x, int y, int z, int w, int v,
                                         uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, "
        "%6}], [%7];" ::"r"(target),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v), "r"(barrier)
        : "memory");
}

// Registers of each thread of this warpgroup from here on; what one gives back, another can take.
template <int Count> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// Named barriers: `threads` arrive, and some of them wait until all have.
__device__ __forceinline__ void arrive_at_named(int name, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
__device__ __forceinline__ void meet_at_named(int name, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// The same; whether the condition holds for any of them.
__device__ __forceinline__ bool meet_or_named(int name, int threads, bool condition) {
    int any;
    asm volatile("{ .reg .pred p, q; setp.ne.s32 p, %1, 0; bar.red.or.pred q, %2, %3, p; selp.s32 %0, 1, 0, q; }"
                 : "=r"(any)
                 : "r"(static_cast<int>(condition)), "r"(name), "r"(threads)
                 : "memory");
    return any;
}

// Where a wgmma reads a tile: from this address on, with panels and groups so many bytes apart.
struct Descriptor {
    uint32_t low, high;

    __device__ __forceinline__ Descriptor(uint32_t address, int panel_bytes, int group_bytes) {
        low = address >> 4 | static_cast<uint32_t>(panel_bytes >> 4) << 16;
        high = static_cast<uint32_t>(group_bytes >> 4) | 1u << 30;  // swizzled by 128 bytes
    }
    __device__ __forceinline__ uint64_t at(int bytes) const {
        uint64_t bits;
        asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "r"(low + (bytes >> 4)), "r"(high));
        return bits;
    }
};

// Registers written so far are seen by the wgmmas after this.
__device__ __forceinline__ void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last `Pending` closed groups of products are done.
template <int Pending> __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Registers that a wgmma reads or writes are not touched across this, as far as the compiler moves code.
template <int N> __device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void pin(uint32_t (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// What leads to this sum of weights is computed before the wait that follows. Nothing else holds ptxas back from moving
// the wait up and the arithmetic, which should fill the time until the products are done, behind it.
__device__ __forceinline__ void finish_first(float never_negative) {
    asm volatile("{ .reg .pred negative; setp.lt.f32 negative, %0, 0f00000000; @negative nanosleep.u32 1; }" ::"f"(
                     never_negative)
                 : "memory");
}

#define PAGEMGR_NAMES_32                                                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "   \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define PAGEMGR_NAMES_64                                                                                               \
    PAGEMGR_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "    \
                     "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PAGEMGR_4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define PAGEMGR_16(x, i) PAGEMGR_4(x, i), PAGEMGR_4(x, i + 4), PAGEMGR_4(x, i + 8), PAGEMGR_4(x, i + 12)
#define PAGEMGR_32(x) PAGEMGR_16(x, 0), PAGEMGR_16(x, 16)
#define PAGEMGR_64(x) PAGEMGR_16(x, 0), PAGEMGR_16(x, 16), PAGEMGR_16(x, 32), PAGEMGR_16(x, 48)

// c = a × bᵀ or, to accumulate, c += a × bᵀ; a and b in shared memory.
#define PAGEMGR_PRODUCT(TYPE, N, NAMES, REGISTERS, A, B, KEEP)                                                         \
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, " KEEP ", 0;\n"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES "}, " A ", " B             \
                 ", keep, 1, 1, 0, 0; }"                                                                               \
                 : REGISTERS                                                                                           \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

template <typename T, int N>
__device__ __forceinline__ void multiply_async(float (&c)[N], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(N == 32 || N == 64, "instructions of 64 or 128 columns");
    constexpr bool HALF = std::is_same_v<T, __half>;
    if constexpr (N == 32 && HALF) PAGEMGR_PRODUCT("f16", 64, PAGEMGR_NAMES_32, PAGEMGR_32(c), "%32", "%33", "%34");
    else if constexpr (N == 32) PAGEMGR_PRODUCT("bf16", 64, PAGEMGR_NAMES_32, PAGEMGR_32(c), "%32", "%33", "%34");
    else if constexpr (HALF) PAGEMGR_PRODUCT("f16", 128, PAGEMGR_NAMES_64, PAGEMGR_64(c), "%64", "%65", "%66");
    else PAGEMGR_PRODUCT("bf16", 128, PAGEMGR_NAMES_64, PAGEMGR_64(c), "%64", "%65", "%66");
}

// c += a × b; a in registers, b in shared memory, read transposed.
#define PAGEMGR_PRODUCT_OF_REGISTERS(TYPE, N, NAMES, REGISTERS, A, B)                                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES "}, {" A "}, " B           \
                 ", 1, 1, 1, 1;"                                                                                       \
                 : REGISTERS                                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <typename T, int N>
__device__ __forceinline__ void multiply_async(float (&c)[N], const uint32_t *a, uint64_t b) {
    static_assert(N == 32 || N == 64, "instructions of 64 or 128 columns");
    constexpr bool HALF = std::is_same_v<T, __half>;
    if constexpr (N == 32 && HALF)
        PAGEMGR_PRODUCT_OF_REGISTERS("f16", 64, PAGEMGR_NAMES_32, PAGEMGR_32(c), "%32, %33, %34, %35", "%36");
    else if constexpr (N == 32)
        PAGEMGR_PRODUCT_OF_REGISTERS("bf16", 64, PAGEMGR_NAMES_32, PAGEMGR_32(c), "%32, %33, %34, %35", "%36");
    else if constexpr (HALF)
        PAGEMGR_PRODUCT_OF_REGISTERS("f16", 128, PAGEMGR_NAMES_64, PAGEMGR_64(c), "%64, %65, %66, %67", "%68");
    else PAGEMGR_PRODUCT_OF_REGISTERS("bf16", 128, PAGEMGR_NAMES_64, PAGEMGR_64(c), "%64, %65, %66, %67", "%68");
}

#undef PAGEMGR_PRODUCT
#undef PAGEMGR_PRODUCT_OF_REGISTERS
#undef PAGEMGR_NAMES_32
#undef PAGEMGR_NAMES_64
#undef PAGEMGR_4
#undef PAGEMGR_16
#undef PAGEMGR_32
#undef PAGEMGR_64

#endif

}  // namespace pagemgr
