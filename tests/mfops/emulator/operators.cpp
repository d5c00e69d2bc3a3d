// csrc/cuda's operators on CPU tensors, as torch.ops.mfops_emulated.
#include <torch/csrc/stable/library.h>

// clang-format off: the emulator's primitives first
#include "cuda/common/primitives.cuh"
#include "cuda/reconstruct/op.cpp"
#include "cuda/reconstruct/launch.cu"
#include "cuda/common/mean.cu"
#include "cuda/instantiations/reconstruct_float32.cu"
#include "cuda/instantiations/reconstruct_tf32.cu"
#include "cuda/instantiations/reconstruct_bf16.cu"
#include "cuda/instantiations/reconstruct_f16.cu"
// clang-format on

STABLE_TORCH_LIBRARY_FRAGMENT(mfops_emulated, m) {
    m.def("reconstruct(Tensor x, Tensor y, Tensor z, bool tf32) -> (Tensor, Tensor)");
    m.def("mse(Tensor x, Tensor y, Tensor z, bool tf32) -> Tensor");
    m.def(
        "reconstruct_backward(Tensor? grad_x_hat, Tensor? grad_mse, Tensor x, Tensor y, Tensor z, "
        "bool need_x, bool need_y, bool need_z, bool tf32) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mfops_emulated, CPU, m) {
    m.impl("reconstruct", TORCH_BOX(&mfops::cuda::reconstruct));
    m.impl("mse", TORCH_BOX(&mfops::cuda::mse));
    m.impl("reconstruct_backward", TORCH_BOX(&mfops::cuda::reconstruct_backward));
}
