#include <memory>

#include "cuda/common/check.cuh"
#include "cuda/common/probe.h"

namespace mfops {
namespace {

__global__ void write_arch(int* arch) {
#ifdef __CUDA_ARCH__
    *arch = __CUDA_ARCH__ / 10;
#endif
}

class DeviceGuard {
   public:
    explicit DeviceGuard(int device_index) {
        MFOPS_CUDA_CHECK(cudaGetDevice(&previous_));
        MFOPS_CUDA_CHECK(cudaSetDevice(device_index));
    }
    ~DeviceGuard() { cudaSetDevice(previous_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

   private:
    int previous_ = 0;
};

}  // namespace

int cuda_toolkit_version() { return CUDART_VERSION; }

std::vector<int> cuda_archs() {
    std::vector<int> archs = {__CUDA_ARCH_LIST__};
    for (int& arch : archs) arch /= 10;
    return archs;
}

std::string cuda_unavailable_reason(int device_index) {
    const DeviceGuard guard(device_index);
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, write_arch);
    if (status == cudaSuccess) return "";
    cudaGetLastError();  // not left for the next caller to find
    return cudaGetErrorString(status);
}

int cuda_probe(int device_index) {
    const DeviceGuard guard(device_index);
    int* raw = nullptr;
    MFOPS_CUDA_CHECK(cudaMalloc(&raw, sizeof(int)));
    const std::unique_ptr<int, cudaError_t (*)(void*)> device_arch(raw, cudaFree);
    write_arch<<<1, 1>>>(device_arch.get());
    MFOPS_CUDA_CHECK(cudaGetLastError());
    int arch = 0;
    MFOPS_CUDA_CHECK(cudaMemcpy(&arch, device_arch.get(), sizeof(int), cudaMemcpyDeviceToHost));
    return arch;
}

}  // namespace mfops
