// Y and Z found on each image on the CPU, one pass over X a round.
//
// The formulas are those of mfops/reference.py and mfops/methods; shapes and dtypes those of
// mfops/ops.py. Arguments were checked in Python. TF32 is a GPU's affair: `tf32` is ignored.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace mfops::cpu {

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

}  // namespace mfops::cpu
