// What the library says of itself: its version, its structs, its errors, what it can do on this machine.
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "attention.cuh"
#include "library.cuh"

namespace pagemgr {
namespace {

thread_local char message[512] = "";

}  // namespace

int fail(int status, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(message, sizeof message, format, values);
    va_end(values);
    return status;
}

int check(cudaError_t error, const char *doing) {
    if (error == cudaSuccess) return PAGEMGR_OK;
    return fail(PAGEMGR_DEVICE, "%s failed: %s (%s)", doing, cudaGetErrorString(error), cudaGetErrorName(error));
}

int find_device(int index, const Device **device) {
    static Device devices[MAX_DEVICES];
    static std::atomic<bool> known[MAX_DEVICES];
    static std::mutex asking;
    if (index < 0 || index >= MAX_DEVICES)
        return fail(PAGEMGR_INVALID, "device_index is %d, at most %d", index, MAX_DEVICES - 1);
    *device = &devices[index];
    if (known[index].load(std::memory_order_acquire)) return PAGEMGR_OK;
    const std::lock_guard<std::mutex> lock(asking);
    int sms, major, minor, shared;
    for (auto [value, attribute] : {std::pair{&sms, cudaDevAttrMultiProcessorCount},
                                    {&major, cudaDevAttrComputeCapabilityMajor},
                                    {&minor, cudaDevAttrComputeCapabilityMinor},
                                    {&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin}}) {
        if (int status = check(cudaDeviceGetAttribute(value, attribute, index), "asking for a device's properties"))
            return status;
    }
    devices[index] = Device{sms, 10 * major + minor, shared};
    known[index].store(true, std::memory_order_release);
    return PAGEMGR_OK;
}

OnDevice::OnDevice(int index) {
    int current;
    if (cudaGetDevice(&current) != cudaSuccess || current == index) return;
    previous_ = current;
    cudaSetDevice(index);
}

OnDevice::~OnDevice() {
    if (previous_ >= 0) cudaSetDevice(previous_);
}

}  // namespace pagemgr

using namespace pagemgr;

int32_t pagemgr_abi_version(void) { return PAGEMGR_ABI_VERSION; }

int64_t pagemgr_struct_size(int32_t which) { return struct_size(which); }

const char *pagemgr_message(void) { return message; }

int32_t pagemgr_get_capabilities(pagemgr_capabilities *capabilities) {
    int index;
    const Device *device;
    if (int status = check(cudaGetDevice(&index), "looking for a CUDA device")) return status;
    if (int status = find_device(index, &device)) return status;
    if (device->capability < 80) {
        return fail(PAGEMGR_DEVICE, "device %d has compute capability %d.%d, at least 8.0 is needed", index,
                    device->capability / 10, device->capability % 10);
    }
    *capabilities = {};
    snprintf(capabilities->variant, sizeof capabilities->variant, "%s", device->capability == 90 ? "sm_90a" : "sm_80");
    capabilities->device = PAGEMGR_CUDA;
    capabilities->graph_capture = 1;
    capabilities->dtypes = 1u << PAGEMGR_FLOAT16 | 1u << PAGEMGR_BFLOAT16;
    capabilities->kv_dtypes = 1u << PAGEMGR_KV_FLOAT8_E4M3FN;
    capabilities->features = PAGEMGR_CAUSAL | PAGEMGR_NON_CAUSAL | PAGEMGR_SLIDING_WINDOW | PAGEMGR_SOFTCAP |
                             PAGEMGR_ALIBI | PAGEMGR_SINKS | PAGEMGR_LSE;
    int count = 0;
    for (int dim : HEAD_DIMS) {
        if (shared_bytes_needed(dim) <= device->max_shared_bytes) capabilities->head_dims[count++] = dim;
    }
    if (count == 0) return fail(PAGEMGR_DEVICE, "device %d has too little shared memory for any head dim", index);
    memcpy(capabilities->block_sizes, BLOCK_SIZES, sizeof BLOCK_SIZES);
    return PAGEMGR_OK;
}
