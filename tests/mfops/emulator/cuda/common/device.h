// csrc/cuda/common/device.h for the emulator: a device of three multiprocessors, so that small
// tensors are split as large ones are on a GPU, with the shared memory that the environment names
// (bytes for a block; by default an sm_90's), and as many clusters side by side as it names (by
// default none).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdlib>

#include "cuda/common/types.h"

namespace mfops::cuda {

class DeviceScope {
   public:
    explicit DeviceScope(const torch::stable::Tensor&) {}

    Limits limits() const {
        const char* bytes = std::getenv("MFOPS_EMULATOR_SHARED_BYTES");
        const int per_block = bytes ? std::atoi(bytes) : 227 * 1024;
        const char* clusters = std::getenv("MFOPS_EMULATOR_CLUSTERS");
        return {3, per_block, per_block + 1024, clusters ? std::atoi(clusters) : 0};
    }
    void* stream() const { return nullptr; }
};

}  // namespace mfops::cuda
