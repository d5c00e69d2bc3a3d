// csrc/cuda's operators that find factors, on CPU tensors, as torch.ops.mfops_emulated.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>

// clang-format off: the emulator's primitives first
#include "cuda/common/primitives.cuh"
#include "cuda/common/mean.cu"
#include "cuda/factorize/op.cpp"
#include "cuda/factorize/launch.cu"
#include "cuda/instantiations/factorize_float32.cu"
#include "cuda/instantiations/factorize_tf32.cu"
#include "cuda/instantiations/factorize_bf16.cu"
#include "cuda/instantiations/factorize_f16.cu"
// clang-format on

namespace mfops::cuda {

// The last step of a factorization, where it is a launch of its own: on the CPU's kernels, which
// need not be compiled here.
std::tuple<Tensor, Tensor> reconstruct(const Tensor& x, const Tensor& y, const Tensor& z,
                                       bool tf32) {
    using torch::stable::detail::from, torch::stable::detail::to;
    std::array<StableIValue, 4> stack{from(x), from(y), from(z), from(tf32)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("mfops::reconstruct", "", stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

namespace {

// Whether all rounds are planned as one launch.
bool is_persistent(const Tensor& x, int64_t rank, std::string method) {
    const FactorProblem p = factor_problem_of(x, rank, false);
    return plan_factorize(p, DeviceScope(x).limits(), method_of(method), 1, false)
        .persistent.has_value();
}

}  // namespace
}  // namespace mfops::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mfops_emulated, m) {
    m.def(
        "factorize(Tensor x, Tensor y0, str method, int steps, bool tf32, "
        "float inverse_temperature=100.0) -> (Tensor, Tensor)");
    m.def(
        "factorize_reconstruct(Tensor x, Tensor y0, str method, int steps, bool tf32) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "nmf_backward(Tensor? grad_x_hat, Tensor? grad_mse, Tensor x, Tensor y, Tensor z, "
        "Tensor z_scale, bool tf32) -> Tensor");
    m.def("is_persistent(Tensor x, int rank, str method) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(mfops_emulated, CPU, m) {
    m.impl("factorize", TORCH_BOX(&mfops::cuda::factorize));
    m.impl("factorize_reconstruct", TORCH_BOX(&mfops::cuda::factorize_reconstruct));
    m.impl("nmf_backward", TORCH_BOX(&mfops::cuda::nmf_backward));
    m.impl("is_persistent", TORCH_BOX(&mfops::cuda::is_persistent));
}
