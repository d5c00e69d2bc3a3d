// Torch's tensors as the kernels see them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "cuda/common/types.h"
#include "feature_memory.h"

namespace mfops::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The last two dimensions as lines of elements, or the other way round.
inline Lines lines_of(const Tensor& t, bool columns = false) {
    const int64_t d = t.dim() - 2;
    return {t.data_ptr(), d == 1 ? t.stride(0) : 0, t.stride(columns ? d + 1 : d),
            t.stride(columns ? d : d + 1)};
}

inline Type type_of(const Tensor& x, bool tf32) {
    switch (x.scalar_type()) {
        case ScalarType::Float:
            return tf32 ? Type::kTf32 : Type::kFloat32;
        case ScalarType::BFloat16:
            return Type::kBf16;
        case ScalarType::Half:
            return Type::kF16;
        default:
            throw std::runtime_error("mfops: the CUDA kernels take float32, bfloat16 and float16");
    }
}

inline int checked_rank(int64_t rank) {
    if (rank > kMaxRank) {
        throw std::runtime_error("mfops: the CUDA kernels take K <= " + std::to_string(kMaxRank) +
                                 ", got " + std::to_string(rank));
    }
    return static_cast<int>(rank);
}

inline Tensor bytes(const Tensor& x, size_t count) {
    return torch::stable::new_empty(x, {static_cast<int64_t>(count)}, ScalarType::Byte);
}

}  // namespace mfops::cuda
