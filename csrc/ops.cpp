// Registers the kernels at the dispatcher's keys. The schemas are in mfops/ops.py.
#include <torch/csrc/stable/library.h>

#include "cpu/factorize/op.h"
#include "cpu/reconstruct/op.h"
#ifdef MFOPS_WITH_CUDA
#include "cuda/factorize/op.h"
#include "cuda/reconstruct/op.h"
#endif

STABLE_TORCH_LIBRARY_IMPL(mfops, CPU, m) {
    m.impl("reconstruct", TORCH_BOX(&mfops::cpu::reconstruct));
    m.impl("mse", TORCH_BOX(&mfops::cpu::mse));
    m.impl("reconstruct_backward", TORCH_BOX(&mfops::cpu::reconstruct_backward));
    m.impl("factorize", TORCH_BOX(&mfops::cpu::factorize));
    m.impl("factorize_reconstruct", TORCH_BOX(&mfops::cpu::factorize_reconstruct));
    m.impl("nmf_backward", TORCH_BOX(&mfops::cpu::nmf_backward));
}

#ifdef MFOPS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mfops, CUDA, m) {
    m.impl("reconstruct", TORCH_BOX(&mfops::cuda::reconstruct));
    m.impl("mse", TORCH_BOX(&mfops::cuda::mse));
    m.impl("reconstruct_backward", TORCH_BOX(&mfops::cuda::reconstruct_backward));
    m.impl("factorize", TORCH_BOX(&mfops::cuda::factorize));
    m.impl("factorize_reconstruct", TORCH_BOX(&mfops::cuda::factorize_reconstruct));
    m.impl("nmf_backward", TORCH_BOX(&mfops::cuda::nmf_backward));
}
#endif
