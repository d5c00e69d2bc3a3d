// Features (B, C, N) as both kinds of kernels take them: which dimension is innermost in memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace mfops {

using torch::stable::Tensor;

// Whether x lies in memory with its channels innermost, as channels_last images do.
inline bool channels_innermost(const Tensor& x) { return x.stride(2) != 1 && x.stride(1) == 1; }

// New memory for features like x or, not batched, for one image's (C, N), with the same dimension
// innermost.
inline Tensor empty_features(const Tensor& x, bool batched = true) {
    const bool transpose = channels_innermost(x);
    const int64_t rows = x.size(transpose ? 2 : 1), cols = x.size(transpose ? 1 : 2);
    const Tensor memory = batched ? torch::stable::new_empty(x, {x.size(0), rows, cols})
                                  : torch::stable::new_empty(x, {rows, cols});
    return transpose ? torch::stable::transpose(memory, -1, -2) : memory;
}

}  // namespace mfops
