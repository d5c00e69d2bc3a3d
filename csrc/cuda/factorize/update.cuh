// The small kernels between two rounds: Y from the blocks' partial sums, added in order, and Y^T Y.
#pragma once

#include "cuda/factorize/methods.cuh"

namespace mfops::cuda {

// Where Y comes from: y0; em's, vq's and cd's means; nmf's multiplicative update; Y itself, its
// columns divided as `division` says.
enum class Update { kStart, kMeans, kNmf, kDivide };

inline constexpr int kRowsOfThread = 16;

struct UpdateParams {
    int64_t channels;
    int rank, slice, slices;
    Lines start;            // y0 in float32: lines are channels
    const float* partials;  // (B, ranges, C, padded)
    const float* sums;      // (B, ranges, padded), nmf: (B, ranges, padded, padded)
    int ranges;
    Division division;
    float* y;        // (B, C, K); null: not wanted
    void* bases;     // (B, C, padded) in T
    float* squares;  // (B, slices, padded); null: not wanted, nor
    float* factors;  // (B, padded)
};

// Threads side by side have bases side by side; each has 16 of the channels.
__host__ __device__ constexpr int slice_of(int padded) { return kThreads / padded * kRowsOfThread; }
// nmf: Y's part, and 16 rows of Z Z^T; else the threads' sums of squares.
constexpr size_t update_shared_bytes(int padded) {
    return sizeof(float) * (slice_of(padded) * padded + kRowsOfThread * padded);
}

// A block for each slice of an image's channels.
template <class T, Update kUpdate>
__global__ void __launch_bounds__(kThreads, 1)
    update_kernel(const __grid_constant__ UpdateParams params) {
    const int padded = padded_16(params.rank), per_pass = kThreads / padded;
    const int k = threadIdx.x % padded, lane_row = threadIdx.x / padded;
    const int64_t image = blockIdx.x / params.slices;
    const int part = blockIdx.x % params.slices;
    const int64_t first = static_cast<int64_t>(part) * params.slice;
    const int rows = within(params.channels - first, params.slice);
    float* const y =
        params.y ? params.y + (image * params.channels + first) * params.rank : nullptr;
    const bool is_base = k < params.rank && lane_row < per_pass;
    const auto row_of = [&](int i) { return lane_row + i * per_pass; };

    float value[kRowsOfThread];
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
        value[i] = 0;
        const int row = row_of(i);
        if (row >= rows || !is_base) continue;
        if constexpr (kUpdate == Update::kStart) {
            value[i] = *origin_of<float>(params.start, image, first + row, k);
        } else if constexpr (kUpdate == Update::kDivide) {
            value[i] = y[static_cast<int64_t>(row) * params.rank + k];
        } else {
            value[i] =
                sum_of(params.partials +
                           (image * params.ranges * params.channels + first + row) * padded + k,
                       params.ranges, params.channels * padded);
        }
    }
    // Y is value times factor: a base that no pixel comes close to would vanish in float16.
    float factor = 1;
    if constexpr (kUpdate == Update::kMeans) {
        const float weight =
            sum_of(params.sums + image * params.ranges * padded + k, params.ranges, padded);
        factor = weight / (kEps + weight);
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) value[i] = weight == 0 ? 0 : value[i] / weight;
    }
    if constexpr (kUpdate == Update::kDivide) {
        const float squares =
            sum_of(params.squares + image * params.slices * padded + k, params.slices, padded);
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) value[i] /= divisor(params.division, squares);
    }
    float* const shared = reinterpret_cast<float*>(shared_memory());
    if constexpr (kUpdate == Update::kNmf) {
        float* const gram = shared + params.slice * padded;
        const float* const sums = params.sums + image * params.ranges * padded * padded;
        for (int i = threadIdx.x; i < rows * padded; i += kThreads) {
            const int row = i / padded, l = i - row * padded;
            shared[i] = l < params.rank ? y[static_cast<int64_t>(row) * params.rank + l] : 0;
        }
        float denominator[kRowsOfThread] = {};
#pragma unroll 1
        for (int l = 0; l < padded; l += kRowsOfThread) {
            __syncthreads();
            for (int i = threadIdx.x; i < kRowsOfThread * padded; i += kThreads) {
                gram[i] = sum_of(sums + l * padded + i, params.ranges, padded * padded);
            }
            __syncthreads();
#pragma unroll 1
            for (int j = 0; j < kRowsOfThread; ++j) {
                const float right = gram[j * padded + k];
#pragma unroll
                for (int i = 0; i < kRowsOfThread; ++i) {
                    if (row_of(i) < rows)
                        denominator[i] += shared[row_of(i) * padded + l + j] * right;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
            if (row_of(i) < rows) {
                value[i] = shared[row_of(i) * padded + k] * value[i] / (denominator[i] + kEps);
            }
        }
    }

    float squares = 0;
    T* const bases = static_cast<T*>(params.bases) + (image * params.channels + first) * padded + k;
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
        const int row = row_of(i);
        if (row >= rows || lane_row >= per_pass) continue;
        const float exact = factor * value[i];
        squares += exact * exact;
        if (is_base && params.y) y[static_cast<int64_t>(row) * params.rank + k] = exact;
        bases[row * padded] = from_float<T>(is_base ? value[i] : 0);
    }
    if ((kUpdate == Update::kStart || kUpdate == Update::kMeans) && params.squares) {
        if (lane_row < per_pass) shared[threadIdx.x] = squares;
        __syncthreads();
        if (lane_row == 0) {
            if (part == 0) params.factors[image * padded + k] = factor;
            params.squares[(image * params.slices + part) * padded + k] =
                sum_of(shared + k, per_pass, padded);
        }
    }
}

struct GramParams {
    int64_t channels;
    int padded;
    const void* bases;  // (B, C, padded)
    void* gram;         // (B, padded, padded)
};

inline constexpr int kGramStages = 4;

// Channels on their way at a time: there is little to multiply, so what counts is how seldom memory
// is waited for. All stages fit the 99 KiB that a block has at least.
template <class T>
__host__ __device__ constexpr int gram_chunk(int padded) {
    const int line = base_pitch<T>(padded) * static_cast<int>(sizeof(T));
    const int fits = 96 * 1024 / (kGramStages * line) / 16 * 16;
    return fits < 128 ? fits : 128;
}

template <class T>
constexpr size_t gram_shared_bytes(int padded) {
    return sizeof(T) * kGramStages * gram_chunk<T>(padded) * base_pitch<T>(padded);
}

// Y^T Y in Y's rounded type, a block for 16 of its rows.
template <Type kType>
__global__ void __launch_bounds__(kThreads) gram_kernel(const __grid_constant__ GramParams params) {
    using T = Element<kType>;
    const int padded = params.padded, pitch = base_pitch<T>(padded), blocks = padded / 16;
    const int chunk = gram_chunk<T>(padded);
    const int64_t image = blockIdx.x / blocks;
    const int row = blockIdx.x % blocks * 16;
    const T* const bases = static_cast<const T*>(params.bases) + image * params.channels * padded;
    const auto tile = [&](int slot) { return Tile<T>{slot * chunk * pitch, pitch}; };
    const auto channels = [&](int step) {
        return within(params.channels - static_cast<int64_t>(step) * chunk, chunk);
    };
    Accumulators<kType, 16, kMaxRank, kWarps> sum;
    const auto load = [&](int step, int slot) {
        load_dense(tile(slot), bases + static_cast<int64_t>(step) * chunk * padded,
                   padded_16(channels(step)), padded, channels(step));
    };
    const auto compute = [&](int step, int slot) {
        const auto all = tile(slot);
        sum.template add<false, false>(Tile<T>{all.start + row, pitch}, all,
                                       padded_16(channels(step)), 16, padded);
    };
    pipeline(static_cast<int>((params.channels + chunk - 1) / chunk), kGramStages, load, compute);
    T* const gram = static_cast<T*>(params.gram) + (image * padded + row) * padded;
    sum.for_each_pair([&](int r, int c, float& v, float& w) {
        if (c >= padded) return;
        gram[r * padded + c] = from_float<T>(v);
        gram[r * padded + c + 1] = from_float<T>(w);
    });
}

}  // namespace mfops::cuda
