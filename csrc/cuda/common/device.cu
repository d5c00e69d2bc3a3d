#include <map>
#include <mutex>

#include "cuda/common/check.cuh"
#include "cuda/common/device.h"

namespace mfops::cuda {
namespace {

__global__ void empty_kernel() {}

// None where the device cannot, the code that runs on it was not compiled for what can, or too few
// of its multiprocessors lie side by side, as in a part of a GPU (MIG).
int clusters_side_by_side(int major, int shared_bytes) {
    cudaFuncAttributes attributes;
    MFOPS_CUDA_CHECK(cudaFuncGetAttributes(&attributes, empty_kernel));
    if (major < 9 || attributes.ptxVersion < 90) return 0;
    MFOPS_CUDA_CHECK(cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          shared_bytes));
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kClusterBlocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = kClusterBlocks;
    config.blockDim = kClusterThreads;
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    // Some answer with an error for none at all, which is not to stay behind as the last one.
    if (cudaOccupancyMaxActiveClusters(&clusters, empty_kernel, &config) != cudaSuccess) {
        cudaGetLastError();
        return 0;
    }
    return clusters;
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
    const int shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const Limits limits{
        .multiprocessors = attribute(cudaDevAttrMultiProcessorCount),
        .shared_per_block = shared_per_block,
        .shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
        .clusters =
            clusters_side_by_side(attribute(cudaDevAttrComputeCapabilityMajor), shared_per_block)};
    known.emplace(device_index, limits);
    return limits;
}

}  // namespace mfops::cuda
