// What the methods that find Y and Z have in common, and the few formulas that tell them apart.
#pragma once

#include <type_traits>

#include "cuda/factorize/columns.cuh"

namespace mfops::cuda {

enum class Family { kMeans, kNmf };  // em, vq and cd; nmf

// float16 has too small a range for a softmax's coefficients: a base that no pixel comes close to
// would lose its own, and its mean with them. They are left in float32 and multiplied as TF32.
template <Type kType, Family kFamily>
inline constexpr bool kWide = kType == Type::kF16 && kFamily == Family::kMeans;
template <Type kType, bool kWideZ>
using Coefficient = std::conditional_t<kWideZ, float, Element<kType>>;
template <Type kType, bool kWideZ>
inline constexpr Type kProductType = kWideZ ? Type::kTf32 : kType;

// What columns of Y are to be divided by before they meet X: not at all, 1e-6 + their length, or
// their length where that is larger than 1e-6.
enum class Division { kNone, kSum, kMaximum };

inline constexpr float kEps = 1e-6f;

struct alignas(8) Two {
    float first, second;
};
struct Four {
    float v[4];
};
__device__ __forceinline__ Four four_of(const uint4& bits) {
    return {as_float(bits.x), as_float(bits.y), as_float(bits.z), as_float(bits.w)};
}
__device__ __forceinline__ Four load_four(const float* from) {
    uint4 bits;
    load_shared(bits, from);
    return four_of(bits);
}

__device__ __forceinline__ float divisor(Division division, float squares) {
    switch (division) {
        case Division::kSum:
            return kEps + sqrtf(squares);
        case Division::kMaximum:
            return fmaxf(sqrtf(squares), kEps);
        default:
            return 1;
    }
}

// The sum of `count` floats `stride` apart, in order.
__device__ __forceinline__ float sum_of(const float* parts, int count, int64_t stride) {
    float sum = 0;
#pragma unroll 8
    for (int i = 0; i < count; ++i) sum += parts[i * stride];
    return sum;
}

// Adds to each value that `has` one the sum of `count` floats `stride` apart, in order; those of
// the next value are `apart` from them. All of a count are on their way at a time.
template <int kValues, class Has>
__device__ __forceinline__ void add_sums(float (&value)[kValues], const float* parts, int64_t apart,
                                         int count, int64_t stride, Has has) {
#pragma unroll 2
    for (int i = 0; i < count; ++i, parts += stride) {
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            if (has(j)) value[j] += parts[j * apart];
        }
    }
}

template <class T>
__device__ __forceinline__ float* floats_at(int element) {
    return reinterpret_cast<float*>(reinterpret_cast<T*>(shared_memory()) + element);
}

}  // namespace mfops::cuda
