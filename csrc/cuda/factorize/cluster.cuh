// What the persistent kernel (persistent.cuh) is made of: what lies where in the shared memory of a
// cluster's blocks, and what passes from block to block.
#pragma once

#include "cuda/common/swizzled.cuh"
#include "cuda/factorize/methods.cuh"

namespace mfops::cuda {

inline constexpr int kMaxPersistentChannels = 512, kMaxPersistentRank = 64,
                     kMaxPersistentSpan = 256;

__host__ __device__ constexpr int padded_32(int n) { return (n + 31) / 32 * 32; }

struct PersistentParams {
    FactorProblem problem;
    int span;  // columns that a block has room for, whole 16s
    int steps;
    bool reconstruct;   // not the rounds alone
    Lines start;        // y0 in float32: lines are channels
    float* y;           // (B, C, K)
    void *z, *z_scale;  // (B, K, N)
    void* x_hat;
    double* errors;  // one for each block
};

// Layout in shared memory, in bytes.
struct PersistentLayout {
    static constexpr int kElement = 2;
    int channels, padded, span;  // channels in whole 32s, bases in whole 16s

    __host__ __device__ constexpr int half() const { return channels / 2; }
    // Channels of each half that a block owns.
    __host__ __device__ constexpr int owned() const {
        return (half() + kClusterBlocks - 1) / kClusterBlocks;
    }
    __host__ __device__ constexpr int x() const { return 0; }
    __host__ __device__ constexpr int y() const { return channels * span * kElement; }
    // Y, or sums of half the channels, or those of Z Z^T and the block's own part of Y.
    __host__ __device__ constexpr int y_bytes() const {
        const int bases = channels * padded * kElement;
        const int sums = (padded + 2 * owned()) * padded * static_cast<int>(sizeof(float));
        return bases > sums ? bases : sums;
    }
    __host__ __device__ constexpr int z() const { return y() + y_bytes(); }
    __host__ __device__ constexpr int weights() const { return z() + span * padded * kElement; }
    __host__ __device__ constexpr int squares() const {
        return weights() + padded * static_cast<int>(sizeof(float));
    }
    __host__ __device__ constexpr int totals() const {
        return squares() + padded * static_cast<int>(sizeof(float));
    }
    __host__ __device__ constexpr int ones() const {
        return totals() + padded * static_cast<int>(sizeof(float));
    }
    __host__ __device__ constexpr int bytes() const { return ones() + 16; }
};

// a / b for b > 0, off by two units in the last place at most: a few instructions instead of the
// branches of the exact quotient.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }

__device__ __forceinline__ void store_four(float* to, const Four& four) {
    const auto& v = four.v;
    store_shared(to, uint4{as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])});
}
// Four floats of every block of the cluster, all on their way at a time, added in order.
__device__ __forceinline__ Four sum_of_blocks(const float* from) {
    uint4 parts[kClusterBlocks];
#pragma unroll
    for (unsigned rank = 0; rank < kClusterBlocks; ++rank) load_cluster(parts[rank], from, rank);
    Four sum{};
#pragma unroll
    for (unsigned rank = 0; rank < kClusterBlocks; ++rank) {
        const Four part = four_of(parts[rank]);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.v[i] += part.v[i];
    }
    return sum;
}
// A thread's own part of Y: four bases of a channel of each half, if any.
struct OwnPart {
    bool any;
    int row, row_of_half;  // of the block's channels in a half, of all of them
    int basis;             // the first
};

template <class T>
__device__ __forceinline__ uint32_t packed(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
// Four neighboring elements to the same place in every block of the cluster.
template <class T>
__device__ __forceinline__ void store_in_blocks(T* to, const Four& four) {
    const uint2 bits{packed<T>(four.v[0], four.v[1]), packed<T>(four.v[2], four.v[3])};
#pragma unroll
    for (unsigned rank = 0; rank < kClusterBlocks; ++rank) {
        store_cluster(to, rank, bits);
    }
}

__device__ __forceinline__ void store_in_blocks(float* to, const Four& four) {
    const uint2 low{as_bits(four.v[0]), as_bits(four.v[1])};
    const uint2 high{as_bits(four.v[2]), as_bits(four.v[3])};
#pragma unroll
    for (unsigned rank = 0; rank < kClusterBlocks; ++rank) {
        store_cluster(to, rank, low);
        store_cluster(to + 2, rank, high);
    }
}

// A matrix of ones: every line of it is the same 16 bytes.
template <class T>
struct Ones {
    T* granule;

    __device__ __forceinline__ T* at(int, int) const { return granule; }
};

// Adds A B to `sum`, of which this warp has `rows` and `cols` or, where `full`, all: that path
// knows no limits and so has no branches.
template <bool kAByK, bool kBByK, class Sum, class A, class B>
__device__ __forceinline__ void add_within(Sum& sum, const A& a, const B& b, int contraction,
                                           bool full, int rows, int cols) {
    if (full) {
        sum.template add<kAByK, kBByK>(a, b, contraction);
    } else {
        sum.template add<kAByK, kBByK>(a, b, contraction, rows, cols);
    }
}

}  // namespace mfops::cuda
