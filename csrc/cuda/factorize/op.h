// The operators that find factors, on CUDA tensors. The formulas are those of mfops/reference.py;
// shapes those of mfops/ops.py. Arguments were checked in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace mfops::cuda {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> factorize(const Tensor& x, const Tensor& y0, std::string method,
                                     int64_t steps, bool tf32, double inverse_temperature);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> factorize_reconstruct(const Tensor& x,
                                                                         const Tensor& y0,
                                                                         std::string method,
                                                                         int64_t steps, bool tf32);

Tensor nmf_backward(const std::optional<Tensor>& grad_x_hat, const std::optional<Tensor>& grad_mse,
                    const Tensor& x, const Tensor& y, const Tensor& z, const Tensor& z_scale,
                    bool tf32);

}  // namespace mfops::cuda
