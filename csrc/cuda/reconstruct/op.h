// The operators on CUDA tensors. The formulas are those of mfops/reference.py; shapes and the
// meaning of an empty gradient those of mfops/ops.py. Arguments were checked in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace mfops::cuda {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> reconstruct(const Tensor& x, const Tensor& y, const Tensor& z,
                                       bool tf32);

Tensor mse(const Tensor& x, const Tensor& y, const Tensor& z, bool tf32);

std::tuple<Tensor, Tensor, Tensor> reconstruct_backward(const std::optional<Tensor>& grad_x_hat,
                                                        const std::optional<Tensor>& grad_mse,
                                                        const Tensor& x, const Tensor& y,
                                                        const Tensor& z, bool need_x, bool need_y,
                                                        bool need_z, bool tf32);

}  // namespace mfops::cuda
