// Every CUDA call and launch goes through MFOPS_CUDA_CHECK.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mfops {

inline void cuda_check(cudaError_t status, const char* call) {
    if (status != cudaSuccess) {
        cudaGetLastError();  // an error that was reported is not left for the next caller to find
        throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(status) + " (" +
                                 cudaGetErrorName(status) + ") in " + call);
    }
}

}  // namespace mfops

#define MFOPS_CUDA_CHECK(call) ::mfops::cuda_check((call), #call)
