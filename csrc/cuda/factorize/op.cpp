// Memory for the results, then the kernels that find factors, on torch's current stream.
#include "cuda/factorize/op.h"

#include <stdexcept>

#include "cuda/common/device.h"
#include "cuda/common/tensors.h"
#include "cuda/factorize/problem.h"
#include "cuda/reconstruct/op.h"

namespace mfops::cuda {
namespace {

Method method_of(const std::string& name) {
    if (name == "em") return Method::kEm;
    if (name == "vq") return Method::kVq;
    if (name == "cd") return Method::kCd;
    if (name == "nmf") return Method::kNmf;
    throw std::runtime_error("mfops: there are no CUDA kernels for method " + name);
}

FactorProblem factor_problem_of(const Tensor& x, int64_t rank, bool tf32) {
    FactorProblem p;
    p.type = type_of(x, tf32);
    p.transposed = channels_innermost(x);
    p.batch = x.size(0);
    p.channels = x.size(1);
    p.pixels = x.size(2);
    p.rank = checked_rank(rank);
    p.x = lines_of(x, p.transposed);
    return p;
}

Tensor empty_bases(const FactorProblem& p, const Tensor& x) {
    return torch::stable::new_empty(x, {p.batch, p.channels, p.rank}, ScalarType::Float);
}

// Y in X's type, padded; its first K columns are y as `reconstruct` takes it.
Tensor empty_rounded_bases(const FactorProblem& p, const FactorizePlan& plan, const Tensor& x) {
    return torch::stable::new_empty(x, {p.batch, p.channels, plan.padded});
}

Tensor empty_coefficients(const FactorProblem& p, const Tensor& x) {
    return torch::stable::new_empty(x, {p.batch, p.rank, p.pixels});
}

}  // namespace

std::tuple<Tensor, Tensor> factorize(const Tensor& x, const Tensor& y0, std::string method,
                                     int64_t steps, bool tf32, double inverse_temperature) {
    const DeviceScope device(x);
    const FactorProblem p = factor_problem_of(x, y0.size(y0.dim() - 1), tf32);
    const Tensor y = empty_bases(p, x), z = empty_coefficients(p, x);
    const Method which = method_of(method);
    FactorizePlan plan = plan_factorize(p, device.limits(), which, static_cast<int>(steps), false);
    if (which == Method::kVq || which == Method::kCd) {
        plan.inverse_temperature = static_cast<float>(inverse_temperature);
    }
    const Tensor workspace = bytes(x, plan.workspace_bytes);
    Tensor bases = empty_rounded_bases(p, plan, x);
    Factors factors;
    factors.y = static_cast<float*>(y.data_ptr());
    factors.bases = bases.data_ptr();
    factors.z = z.data_ptr();
    launch_factorize(p, plan, lines_of(y0), factors, workspace.data_ptr(), device.stream());
    return {y, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> factorize_reconstruct(const Tensor& x,
                                                                         const Tensor& y0,
                                                                         std::string method,
                                                                         int64_t steps, bool tf32) {
    const DeviceScope device(x);
    const FactorProblem p = factor_problem_of(x, y0.size(y0.dim() - 1), tf32);
    const Method which = method_of(method);
    if (which != Method::kEm && which != Method::kNmf) {
        throw std::runtime_error("mfops: factorize_reconstruct knows em and nmf, got " + method);
    }
    const bool nmf = which == Method::kNmf;
    const Tensor y = empty_bases(p, x), z = empty_coefficients(p, x);
    const Tensor z_scale = nmf ? empty_coefficients(p, x) : torch::stable::new_empty(x, {0});
    const FactorizePlan plan =
        plan_factorize(p, device.limits(), which, static_cast<int>(steps), true);
    const Tensor workspace = bytes(x, plan.workspace_bytes);
    Tensor bases = empty_rounded_bases(p, plan, x);
    Factors factors;
    factors.y = static_cast<float*>(y.data_ptr());
    factors.bases = bases.data_ptr();
    factors.z = z.data_ptr();
    factors.z_scale = z_scale.data_ptr();
    if (!plan.features) {
        launch_factorize(p, plan, lines_of(y0), factors, workspace.data_ptr(), device.stream());
        const Tensor rounded = torch::stable::narrow(bases, 2, 0, p.rank);
        const auto [x_hat, mse] = reconstruct(x, rounded, z, tf32);
        return {y, z, z_scale, x_hat, mse};
    }
    const Tensor x_hat = empty_features(x),
                 mse = torch::stable::new_empty(x, {}, ScalarType::Float);
    factors.x_hat = x_hat.data_ptr();
    factors.mse = static_cast<float*>(mse.data_ptr());
    launch_factorize(p, plan, lines_of(y0), factors, workspace.data_ptr(), device.stream());
    return {y, z, z_scale, x_hat, mse};
}

Tensor nmf_backward(const std::optional<Tensor>& grad_x_hat, const std::optional<Tensor>& grad_mse,
                    const Tensor& x, const Tensor& y, const Tensor& z, const Tensor& z_scale,
                    bool tf32) {
    const DeviceScope device(x);
    const FactorProblem p = factor_problem_of(x, y.size(2), tf32);
    Tensor grad_x = empty_features(x);
    NmfGradients grad;
    if (grad_x_hat) grad.grad_x_hat = lines_of(*grad_x_hat, p.transposed);
    if (grad_mse) grad.grad_mse = static_cast<const float*>(grad_mse->data_ptr());
    if (!grad_x_hat && !grad_mse) return torch::stable::zero_(grad_x), grad_x;
    grad.y = lines_of(y), grad.z = lines_of(z), grad.z_scale = lines_of(z_scale);
    grad.grad_x = grad_x.data_ptr();
    const NmfBackwardPlan plan = plan_nmf_backward(p, device.limits(), grad);
    const Tensor workspace = bytes(x, plan.workspace_bytes);
    launch_nmf_backward(p, plan, grad, workspace.data_ptr(), device.stream());
    return grad_x;
}

}  // namespace mfops::cuda
