#include <map>
#include <mutex>

#include "cuda/check.cuh"
#include "cuda/device.h"

namespace mfops::cuda {
namespace {

__global__ void empty_kernel() {}

// Whether the device can, and the code that runs on it was compiled for what can.
bool has_clusters(int major) {
    cudaFuncAttributes attributes;
    MFOPS_CUDA_CHECK(cudaFuncGetAttributes(&attributes, empty_kernel));
    return major >= 9 && attributes.ptxVersion >= 90;
}

}  // namespace

Limits device_limits(int device_index) {
    static std::mutex mutex;
    static std::map<int, Limits> known;
    const std::lock_guard lock(mutex);
    const auto found = known.find(device_index);
    if (found != known.end()) return found->second;
    const auto attribute = [&](cudaDeviceAttr which) {
        int value = 0;
        MFOPS_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device_index));
        return value;
    };
    const Limits limits{attribute(cudaDevAttrMultiProcessorCount),
                        attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                        attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                        has_clusters(attribute(cudaDevAttrComputeCapabilityMajor))};
    known.emplace(device_index, limits);
    return limits;
}

}  // namespace mfops::cuda
