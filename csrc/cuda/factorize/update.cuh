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
// nmf: rows of Z Z^T that are multiplied by at a time, whole 16s, each thread bringing 16 elements.
__host__ __device__ constexpr int gram_rows(int padded) {
    const int rows = kThreads * kRowsOfThread / padded / 16 * 16;
    return rows < padded ? rows : padded;
}
// nmf: Y's part, and rows of Z Z^T; else the threads' sums of squares.
constexpr size_t update_shared_bytes(int padded) {
    return sizeof(float) * (slice_of(padded) + gram_rows(padded)) * padded;
}

// nmf: adds Y Z Z^T for a thread's channels and basis k. `y`: Y's part in shared memory, zeros
// beyond what there is; after it there is room for rows of Z Z^T, whose `ranges` partial sums are
// `sums`.
__device__ __forceinline__ void add_denominators(float (&denominator)[kRowsOfThread],
                                                 const float* y, float* gram, const float* sums,
                                                 int ranges, int padded) {
    const int per_pass = kThreads / padded, k = threadIdx.x % padded;
    const int row = min(static_cast<int>(threadIdx.x) / padded, per_pass - 1);
#pragma unroll 1
    for (int first = 0; first < padded; first += gram_rows(padded)) {
        const int rows = min(gram_rows(padded), padded - first);
        const auto has = [&](int i) { return threadIdx.x + i * kThreads < rows * padded; };
        float part[kRowsOfThread] = {};
        add_sums(part, sums + first * padded + threadIdx.x, kThreads, ranges, padded * padded, has);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
            if (has(i)) gram[threadIdx.x + i * kThreads] = part[i];
        }
        __syncthreads();
#pragma unroll 1
        for (int l = 0; l < rows; l += 4) {
            float right[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) right[j] = gram[(l + j) * padded + k];
#pragma unroll
            for (int i = 0; i < kRowsOfThread; ++i) {
                const Four left = load_four(y + (row + i * per_pass) * padded + first + l);
#pragma unroll
                for (int j = 0; j < 4; ++j) denominator[i] += left.v[j] * right[j];
            }
        }
    }
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
    const auto has = [&](int i) { return is_base && row_of(i) < rows; };

    float value[kRowsOfThread] = {};
    if constexpr (kUpdate == Update::kStart || kUpdate == Update::kDivide) {
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
            if (!has(i)) continue;
            value[i] = kUpdate == Update::kStart
                           ? *origin_of<float>(params.start, image, first + row_of(i), k)
                           : y[static_cast<int64_t>(row_of(i)) * params.rank + k];
        }
    } else {
        const int64_t start = image * params.ranges * params.channels + first + lane_row;
        add_sums(value, params.partials + start * padded + k, per_pass * padded, params.ranges,
                 params.channels * padded, has);
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
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
            if (lane_row >= per_pass) continue;
            shared[row_of(i) * padded + k] =
                has(i) ? y[static_cast<int64_t>(row_of(i)) * params.rank + k] : 0;
        }
        float denominator[kRowsOfThread] = {};
        add_denominators(denominator, shared, shared + params.slice * padded,
                         params.sums + image * params.ranges * padded * padded, params.ranges,
                         padded);
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
