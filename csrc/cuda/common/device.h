// The GPU a call runs on: made current, asked for what it offers and for torch's stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/common/types.h"

// Lives in torch's CUDA half, which a CPU-only torch lacks; this extension loads there too.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace mfops::cuda {

// Asked of CUDA once for each device. Throws std::runtime_error with CUDA's own words.
Limits device_limits(int device_index);

// Until it ends, the tensor's device is the current one.
class DeviceScope {
   public:
    explicit DeviceScope(const torch::stable::Tensor& tensor)
        : index_(tensor.get_device_index()), guard_(index_) {}

    Limits limits() const { return device_limits(index_); }

    // torch's current stream, a cudaStream_t.
    void* stream() const {
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
        return stream;
    }

   private:
    int index_;
    torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace mfops::cuda
