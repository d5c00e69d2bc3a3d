// Memory for the results, then the kernels, on torch's current stream.
#include "cuda/reconstruct/op.h"

#include <utility>

#include "cuda/common/device.h"
#include "cuda/common/tensors.h"
#include "cuda/reconstruct/problem.h"

namespace mfops::cuda {
namespace {

Problem problem_of(const Tensor& x, const Tensor& y, const Tensor& z, bool tf32) {
    Problem p;
    p.type = type_of(x, tf32);
    p.transposed = channels_innermost(x);
    p.batch = x.size(0);
    p.rows = x.size(p.transposed ? 2 : 1);
    p.cols = x.size(p.transposed ? 1 : 2);
    p.rank = checked_rank(y.size(y.dim() - 1));
    p.x = lines_of(x, p.transposed);
    p.a = lines_of(y), p.b = lines_of(z);
    p.a_per_image = y.dim() == 3, p.b_per_image = z.dim() == 3;
    if (p.transposed) {
        std::swap(p.a, p.b);
        std::swap(p.a_per_image, p.b_per_image);
    }
    return p;
}

Tensor run_forward(const DeviceScope& device, const Problem& p, const Tensor& x, void* x_hat) {
    const ForwardPlan plan = plan_forward(p, device.limits());
    const Tensor mse = torch::stable::new_empty(x, {}, ScalarType::Float);
    const Tensor workspace = bytes(x, plan.workspace_bytes);
    launch_forward(p, plan, x_hat, static_cast<float*>(mse.data_ptr()), workspace.data_ptr(),
                   device.stream());
    return mse;
}

}  // namespace

std::tuple<Tensor, Tensor> reconstruct(const Tensor& x, const Tensor& y, const Tensor& z,
                                       bool tf32) {
    const DeviceScope device(x);
    const Problem p = problem_of(x, y, z, tf32);
    const Tensor x_hat = empty_features(x, p.a_per_image || p.b_per_image);
    return {x_hat, run_forward(device, p, x, x_hat.data_ptr())};
}

Tensor mse(const Tensor& x, const Tensor& y, const Tensor& z, bool tf32) {
    const DeviceScope device(x);
    return run_forward(device, problem_of(x, y, z, tf32), x, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> reconstruct_backward(const std::optional<Tensor>& grad_x_hat,
                                                        const std::optional<Tensor>& grad_mse,
                                                        const Tensor& x, const Tensor& y,
                                                        const Tensor& z, bool need_x, bool need_y,
                                                        bool need_z, bool tf32) {
    const DeviceScope device(x);
    Problem p = problem_of(x, y, z, tf32);
    // An operator's outputs may not share memory, empty or not.
    const auto none = [&] { return torch::stable::new_empty(x, {0}); };
    Tensor grad_x = need_x ? empty_features(x) : none();
    const Tensor grad_y = need_y ? torch::stable::new_empty(y, y.sizes()) : none();
    const Tensor grad_z = need_z ? torch::stable::new_empty(z, z.sizes()) : none();

    Gradients grad;
    if (grad_x_hat) {
        grad.grad_x_hat = lines_of(*grad_x_hat, p.transposed);
        grad.grad_x_hat_per_image = grad_x_hat->dim() == 3;
    }
    if (grad_mse) grad.grad_mse = static_cast<const float*>(grad_mse->data_ptr());
    if (need_x && grad_mse) grad.grad_x = grad_x.data_ptr();
    if (need_x && !grad_mse) torch::stable::zero_(grad_x);
    grad.grad_a = need_y ? grad_y.data_ptr() : nullptr;
    grad.grad_b = need_z ? grad_z.data_ptr() : nullptr;
    if (p.transposed) std::swap(grad.grad_a, grad.grad_b);
    if (grad.grad_x || grad.grad_a || grad.grad_b) {
        const BackwardPlan plan = plan_backward(p, device.limits(), grad);
        const Tensor workspace = bytes(x, plan.workspace_bytes);
        launch_backward(p, plan, grad, workspace.data_ptr(), device.stream());
    }
    return {grad_x, grad_y, grad_z};
}

}  // namespace mfops::cuda
