// X' = Y Z, its error and their gradients for bfloat16 features, by products of bfloat16: what
// op.h has, for arguments that `takes` accepts. The error is of X' before it is rounded;
// D = G' - s (X - X') is rounded to bfloat16 before it is multiplied for the factors' gradients.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/common/bf16_features.h"

namespace mfops::cpu::bf16 {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> reconstruct(const Tensor& x, const Tensor& y, const Tensor& z);

Tensor mse(const Tensor& x, const Tensor& y, const Tensor& z);

std::tuple<Tensor, Tensor, Tensor> reconstruct_backward(const std::optional<Tensor>& grad_x_hat,
                                                        const std::optional<Tensor>& grad_mse,
                                                        const Tensor& x, const Tensor& y,
                                                        const Tensor& z, bool need_x, bool need_y,
                                                        bool need_z);

}  // namespace mfops::cpu::bf16
