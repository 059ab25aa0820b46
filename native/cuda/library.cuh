// What every launcher of this library uses: failing with a reason, the device of a call, launching.
#pragma once

#include <atomic>
#include <cstddef>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <type_traits>

#include "../abi.hpp"

namespace pagemgr {

// Keeps the reason for pagemgr_message and returns the status.
__attribute__((format(printf, 2, 3))) int fail(int status, const char *format, ...);

// PAGEMGR_OK, or PAGEMGR_DEVICE with what the runtime says.
int check(cudaError_t error, const char *doing);

struct Device {
    int num_sms;
    int capability;        // 90 for 9.0
    int max_shared_bytes;  // of one CTA
};

constexpr int MAX_DEVICES = 64;

// The properties of a device, asked for once. Fails with PAGEMGR_DEVICE or PAGEMGR_INVALID.
int find_device(int index, const Device **device);

// Makes the device of a call current until the end of the scope.
class OnDevice {
  public:
    explicit OnDevice(int index);
    ~OnDevice();
    OnDevice(const OnDevice &) = delete;
    OnDevice &operator=(const OnDevice &) = delete;

  private:
    int previous_ = -1;
};

struct Grid {
    dim3 ctas;
    int threads;
    int shared_bytes = 0;
};

// Lets a kernel use more than the 48 KiB of shared memory that need no asking; asks once for each device.
template <auto Kernel> int allow_shared(int device_index, int bytes) {
    static std::atomic<uint64_t> allowed{0};
    const uint64_t bit = uint64_t{1} << device_index;
    if (bytes <= 48 * 1024 || (allowed.load(std::memory_order_acquire) & bit)) return PAGEMGR_OK;
    const cudaError_t error = cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_release);
    return check(error, "raising the shared memory of a kernel");
}

template <auto Kernel, typename... Args> int launch(const pagemgr_run &run, const Grid &grid, const Args &...args) {
    const Device *device;
    if (int status = find_device(run.device_index, &device)) return status;
    if (int status = allow_shared<Kernel>(run.device_index, grid.shared_bytes)) return status;
    cudaLaunchConfig_t config{};
    config.gridDim = grid.ctas;
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = static_cast<cudaStream_t>(run.stream);
    const cudaError_t error = cudaLaunchKernelEx(&config, Kernel, args...);
    return check(error == cudaSuccess ? cudaGetLastError() : error, "launching a kernel");
}

// Ors a pagemgr_error into the call's error word, which may be the host's memory.
__device__ __forceinline__ void report(const pagemgr_run &run, int32_t error) {
    if (run.errors) atomicOr_system(run.errors, error);
}

__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x) {
    if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
    else return __float2bfloat16_rn(x);
}

// Two floats as a pair of T in 32 bits, the first in the low half.
template <typename T> __device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(low, high);
        return reinterpret_cast<const uint32_t &>(pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const uint32_t &>(pair);
    }
}

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

}  // namespace pagemgr
