// A round of a method's updates on a tile of X's columns: the tile's Z, from it the tile's part of
// X Z^T and of Z's row sums (em, vq, cd) or of Z Z^T (nmf). Or, with nmf, what follows the last
// round: the final Z, X' = Y Z and its error. All of Y stays in shared memory, all channels of a
// tile come at once. Where there is no room for that, the kernel finds Z alone, chunk by chunk of
// the channels, while Y passes by as X does; stream_partials.cuh does the rest.
#pragma once

#include "cuda/factorize/methods.cuh"

namespace mfops::cuda {

// What a kernel leaves besides Z: partial sums that Y is updated from; X' and its error; nothing.
enum class Epilogue { kRound, kFeatures, kCoefficients };

struct RoundParams {
    FactorProblem problem;
    ColumnWork work;
    int stages;
    const void* bases;  // (B, C, padded)
    Division division;
    const float* squares;  // (B, slices, padded): parts of the squared lengths of Y's columns
    int slices;
    const float* factors;  // (B, padded): columns of Y are those of `bases` times these
    // vq, cd: columns of X are divided by their lengths and S is multiplied by this; else 0.
    float inverse_temperature;
    bool first;            // nmf: Z starts here, as a softmax
    const void* gram;      // nmf: Y^T Y, (B, padded, padded)
    const void* z_before;  // nmf: (B, N, padded)
    void* z_after;         // (B, N, padded); null: not wanted
    float* partials;       // (B, ranges, C, padded)
    float* sums;           // (B, ranges, padded), nmf: (B, ranges, padded, padded)
    void *z, *z_scale;     // (B, K, N); null: not wanted
    void* x_hat;
    double* errors;  // one for each block
};

// The scores of a tile's pixels, and what is found out about each of them. A pixel's scores lie in
// four lanes of all warps that are side by side.
template <Type kType, int kRank, int kPixels>
struct Scores {
    static constexpr WarpGrid kGrid =
        warp_grid(kPixels, kRank, kWarps, sizeof(Element<kType>) == 2 ? 16 : 8);
    using Product = Accumulators<kType, kPixels, kRank, kWarps, kGrid>;
    static constexpr int kOwn = kPixels / kGrid.rows / 8;  // pixels of a thread
    static constexpr int kPairs = kRank / kGrid.cols / 8;  // of each of them, in a thread
    static constexpr int kParts = kPixels * kGrid.cols;

    __device__ __forceinline__ static int pixel(int own) {
        return threadIdx.x / 32 / kGrid.cols * (8 * kOwn) + 8 * own + threadIdx.x % 32 / 4;
    }
    // f(own, k, v, w) for all pairs of this thread.
    template <class F>
    __device__ __forceinline__ static void for_each_pair(Product& scores, F f) {
        int i = 0;
        scores.for_each_pair([&](int, int k, float& v, float& w) { f(i++ / kPairs, k, v, w); });
    }
    // Of each of its pixels every thread has a value; f of them all, in a fixed order. `parts`:
    // kParts floats of shared memory.
    template <class F>
    __device__ __forceinline__ static void combine(float (&value)[kOwn], float* parts, F f) {
        const int col = threadIdx.x / 32 % kGrid.cols;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            value[i] = f(value[i], shuffle_xor(value[i], 1));
            value[i] = f(value[i], shuffle_xor(value[i], 2));
            if (threadIdx.x % 4 == 0) parts[pixel(i) * kGrid.cols + col] = value[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const float* const part = parts + pixel(i) * kGrid.cols;
            value[i] = part[0];
#pragma unroll
            for (int j = 1; j < kGrid.cols; ++j) value[i] = f(value[i], part[j]);
        }
    }
};

// Layout in shared memory, in elements from its beginning.
template <Type kType, bool kTransposed, Family kFamily, Epilogue kEpilogue, int kOwn, int kRank,
          int kPixels>
struct RoundLayout {
    using T = Element<kType>;
    using X = ChunkTile<T, kTransposed, kOwn, kPixels>;
    using Z = Coefficient<kType, kWide<kType, kFamily>>;
    static constexpr bool kNmf = kFamily == Family::kNmf;
    static constexpr bool kChunks = kEpilogue == Epilogue::kCoefficients;  // Y passes by
    static constexpr int kPerFloat = sizeof(float) / sizeof(T), kPerZ = sizeof(Z) / sizeof(T);

    int padded, stages, channels;

    __host__ __device__ constexpr int pitch() const { return base_pitch<T>(padded); }
    __host__ __device__ constexpr int z_pitch() const { return base_pitch<Z>(padded); }
    __host__ __device__ constexpr int bases() const { return 0; }
    __host__ __device__ constexpr int gram() const {
        return kChunks ? 0 : padded_16(channels) * pitch();
    }
    __host__ __device__ constexpr int stage(int slot) const {
        return gram() + (kNmf && !kChunks ? padded * pitch() : 0) +
               slot * (X::kElements + (kChunks ? kOwn * pitch() : 0));
    }
    // kOwn rows of Y or of Y^T Y.
    __host__ __device__ constexpr int streamed(int slot) const {
        return stage(slot) + X::kElements;
    }
    // nmf: one for each tile whose Z may be on its way or in use. It is needed only after a tile's
    // last channels, so that with many chunks the next tile's is not loaded before.
    __host__ __device__ constexpr int z_tiles() const {
        if (!kNmf) return 1;
        if (!kChunks) return stages;
        return (channels + kOwn - 1) / kOwn >= stages - 1 ? 1 : 2;
    }
    __host__ __device__ constexpr int z(int slot) const {
        return stage(stages) + slot * kPixels * z_pitch() * kPerZ;
    }
    __host__ __device__ constexpr int scale() const { return z(z_tiles()); }
    __host__ __device__ constexpr int squares() const { return scale() + padded * kPerFloat; }
    __host__ __device__ constexpr int parts() const { return squares() + kThreads * kPerFloat; }
    __host__ __device__ constexpr int elements() const {
        return parts() + 2 * Scores<kType, kRank, kPixels>::kParts * kPerFloat;
    }
};

// Writes a tile's coefficients (lines are pixels) to (K, N) in the tensor's own order.
template <int kPixels, class T, class Z>
__device__ __forceinline__ void store_coefficients(const Tile<Z>& tile, T* to,
                                                   const FactorProblem& p, int64_t image,
                                                   int64_t pixel, int pixels) {
    T* const out = to + image * p.rank * p.pixels + pixel;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.rank * kPixels; i += kThreads) {
        const int basis = i / kPixels, n = i % kPixels;
        if (n < pixels) out[basis * p.pixels + n] = from_float<T>(to_float(*tile.at(n, basis)));
    }
}

// One step of a block: a chunk of a tile's channels or, of kCoefficients for nmf, of the rows of
// Y^T Y, which follow.
struct RoundStep {
    int tile, chunk;
    bool gram;
    int64_t pixel;
    int first, count;  // channels or rows
};

template <Type kType, bool kTransposed, Family kFamily, Epilogue kEpilogue, int kOwn, int kRank,
          int kPixels>
__global__ void __launch_bounds__(kThreads, 1)
    round_kernel(const __grid_constant__ RoundParams params) {
    using At = RoundLayout<kType, kTransposed, kFamily, kEpilogue, kOwn, kRank, kPixels>;
    using T = typename At::T;
    using X = typename At::X;
    using Z = typename At::Z;
    using S = Scores<kType, kRank, kPixels>;
    constexpr bool kNmf = kFamily == Family::kNmf, kRound = kEpilogue == Epilogue::kRound;
    constexpr bool kFeatures = kEpilogue == Epilogue::kFeatures, kChunks = At::kChunks;
    const FactorProblem& p = params.problem;
    const int padded = padded_16(p.rank), channels = static_cast<int>(p.channels);
    const At at{padded, params.stages, channels};
    const ColumnItem item = item_of(params.work, p.batch, 1, blockIdx.x);
    const T* const bases = static_cast<const T*>(params.bases) + item.image * p.channels * padded;
    const T* const gram = static_cast<const T*>(params.gram) + item.image * padded * padded;

    float* const scale = floats_at<T>(at.scale());
    for (int k = threadIdx.x; k < padded; k += kThreads) {
        const float squares =
            sum_of(params.squares + (item.image * params.slices) * padded + k,
                   params.division == Division::kNone ? 0 : params.slices, padded);
        scale[k] = params.factors[item.image * padded + k] / divisor(params.division, squares);
    }

    const int chunks = kChunks ? params.work.chunks : 1;
    const int per_tile = chunks + (kChunks && kNmf ? (padded + kOwn - 1) / kOwn : 0);
    const auto step_of = [&](int step) {
        const int tile = step / per_tile, chunk = step - tile * per_tile;
        const bool gram = chunk >= chunks;
        const int first = (gram ? chunk - chunks : chunk) * kOwn;
        return RoundStep{.tile = tile,
                         .chunk = chunk,
                         .gram = gram,
                         .pixel = static_cast<int64_t>(item.first_tile + tile) * kPixels,
                         .first = first,
                         .count = min((gram ? padded : channels) - first, kOwn)};
    };
    // The rows of Y, or of Y^T Y, that a step multiplies by.
    const auto rows_tile = [&](int slot) {
        return Tile<T>{kChunks ? at.streamed(slot) : at.bases(), at.pitch()};
    };
    const auto z_tile = [&](const RoundStep& s) {
        return Tile<Z>{at.z(s.tile % at.z_tiles()) / At::kPerZ, at.z_pitch()};
    };

    const auto load = [&](int step, int slot) {
        const RoundStep s = step_of(step);
        if (!s.gram) {
            X::load(at.stage(slot), p.x, item.image, s.first, s.count, s.pixel, p.pixels);
        }
        if (kChunks || step == 0) {
            load_dense(rows_tile(slot), (s.gram ? gram : bases) + int64_t{s.first} * padded,
                       padded_16(s.count), padded, s.count);
        }
        if constexpr (kNmf) {
            if (!kChunks && step == 0) {
                load_dense(Tile<T>{at.gram(), at.pitch()}, gram, padded, padded, padded);
            }
            if (s.chunk == (kChunks ? chunks : 0) && !params.first) {
                load_dense(z_tile(s),
                           static_cast<const Z*>(params.z_before) +
                               (item.image * p.pixels + s.pixel) * padded,
                           kPixels, padded, within(p.pixels - s.pixel, kPixels));
            }
        }
    };

    // Those of other epilogues: of any shape that the warps can share.
    constexpr int kLines = kTransposed ? kPixels : kOwn, kLength = kTransposed ? kOwn : kPixels;
    using Features =
        Accumulators<kType, kFeatures ? kLines : 128, kFeatures ? kLength : 16, kWarps>;
    using Partial = Accumulators<kProductType<kType, kWide<kType, kFamily>>, kRound ? kOwn : 128,
                                 kRound ? kRank : 16, kWarps>;
    constexpr bool kGram = kRound && kNmf;
    using Gram = Accumulators<kType, kGram ? kRank : 128, kGram ? kRank : 16, kWarps>;
    typename S::Product scores, denominators;
    Partial partial;
    Gram gram_partial;
    float squares = 0, row_sum = 0;
    double error = 0;

    // Softmax over the bases of each of the tile's pixels, into the tile's Z. Takes the scores'
    // place.
    const auto soften = [&](typename S::Product& scores, const RoundStep& s, int pixels) {
        float factor[S::kOwn], largest[S::kOwn], sum[S::kOwn];
#pragma unroll
        for (int i = 0; i < S::kOwn; ++i) factor[i] = 1, largest[i] = -INFINITY, sum[i] = 0;
        if (params.inverse_temperature > 0) {
            float* const parts = floats_at<T>(at.squares());
            parts[threadIdx.x] = squares;
            __syncthreads();
#pragma unroll
            for (int i = 0; i < S::kOwn; ++i) {
                const float all = sum_of(parts + S::pixel(i), kThreads / kPixels, kPixels);
                factor[i] = params.inverse_temperature / fmaxf(sqrtf(all), 1e-12f);
            }
        }
        float* const parts = floats_at<T>(at.parts());
        S::for_each_pair(scores, [&](int i, int k, float& v, float& w) {
            v = k < p.rank ? v * scale[k] : -INFINITY;
            w = k + 1 < p.rank ? w * scale[k + 1] : -INFINITY;
            largest[i] = fmaxf(largest[i], fmaxf(v, w));
        });
        S::combine(largest, parts, [](float a, float b) { return fmaxf(a, b); });
        S::for_each_pair(scores, [&](int i, int k, float& v, float& w) {
            v = k < p.rank ? expf(factor[i] * (v - largest[i])) : 0;
            w = k + 1 < p.rank ? expf(factor[i] * (w - largest[i])) : 0;
            sum[i] += v + w;
        });
        S::combine(sum, parts + S::kParts, [](float a, float b) { return a + b; });
#pragma unroll
        for (int i = 0; i < S::kOwn; ++i) sum[i] = S::pixel(i) < pixels ? 1 / sum[i] : 0;
        const auto z = z_tile(s);
        S::for_each_pair(scores, [&](int i, int k, float& v, float& w) {
            if (k < padded) write_pair(z, S::pixel(i), k, v * sum[i], w * sum[i]);
        });
        __syncthreads();
    };

    // f(score, denominator) in the place of Z, for all of the tile.
    const auto write_z = [&](const RoundStep& s, int pixels, auto f) {
        const auto z = z_tile(s);
        scores.for_each_pair_with(
            denominators, [&](int n, int k, float& v, float& w, float d, float e) {
                if (k >= padded) return;
                write_pair(z, n, k, n < pixels ? f(v, d) : 0, n < pixels ? f(w, e) : 0);
            });
        __syncthreads();
    };

    const auto store_z = [&](const RoundStep& s, void* to, int pixels) {
        store_coefficients<kPixels>(z_tile(s), static_cast<T*>(to), p, item.image, s.pixel, pixels);
    };

    // Z and Y's product, X' in X's place, and the error.
    const auto reconstruct = [&](auto features, const RoundStep& s, int slot, int pixels) {
        if constexpr (kTransposed) {
            features.template add<true, true>(z_tile(s), rows_tile(slot), padded, kPixels,
                                              padded_16(channels));
        } else {
            features.template add<true, true>(rows_tile(slot), z_tile(s), padded,
                                              padded_16(channels), kPixels);
        }
        const auto x = X::tile(at.stage(slot));
        const int line_end = kTransposed ? pixels : channels;
        const int end = kTransposed ? channels : pixels;
        float sum = 0;
        features.for_each_pair([&](int l, int e, float& v, float& w) {
            if (l >= line_end || e >= end) return;
            const Pair<T> pair = read_pair(x, l, e);
            const float first = to_float(pair.first) - v, second = to_float(pair.second) - w;
            sum += first * first;
            if (e + 1 < end) sum += second * second;
            write_pair(x, l, e, v, w);
        });
        error += sum;
        __syncthreads();
        X::store(at.stage(slot), params.x_hat, p, item.image, 0, channels, s.pixel);
    };

    const auto compute = [&](int step, int slot) {
        const RoundStep s = step_of(step);
        const int x_start = at.stage(slot);
        const int pixels = within(p.pixels - s.pixel, kPixels);
        const auto x = X::tile(x_start);
        const auto z = z_tile(s);
        if (!s.gram) {
            if (X::align_lines(x_start, p.x, item.image, s.first, s.count, s.pixel))
                __syncthreads();
            if (s.chunk == 0) {
                scores.zero();
                denominators.zero();
                squares = 0;
            }
            scores.template add<kTransposed, false>(x, rows_tile(slot), padded_16(s.count), kPixels,
                                                    padded);
            if (!kNmf && params.inverse_temperature > 0) {
                const int n = threadIdx.x % kPixels;
                for (int c = threadIdx.x / kPixels; c < s.count; c += kThreads / kPixels) {
                    const float v = to_float(kTransposed ? *x.at(n, c) : *x.at(c, n));
                    squares += v * v;
                }
            }
            if (s.chunk + 1 < chunks) return;
            if constexpr (!kNmf) {
                soften(scores, s, pixels);
            } else if (params.first) {
                denominators = scores;
                soften(denominators, s, pixels);
                denominators.zero();
            }
        }
        if constexpr (kNmf) {
            if constexpr (kChunks) {
                if (!s.gram) return;
                denominators.template add<true, false>(Tile<Z>{z.start + s.first, z.pitch},
                                                       rows_tile(slot), s.count, kPixels, padded);
                if (s.chunk + 1 < per_tile) return;
            } else {
                denominators.template add<true, false>(z, Tile<T>{at.gram(), at.pitch()}, padded,
                                                       kPixels, padded);
            }
            __syncthreads();
            scores.for_each_pair_with(denominators,
                                      [&](int n, int k, float&, float&, float& d, float& e) {
                                          if (k >= padded) return;
                                          const Pair<Z> pair = read_pair(z, n, k);
                                          d = to_float(pair.first) / (d + kEps);
                                          e = to_float(pair.second) / (e + kEps);
                                      });
            if (!kRound && params.z_scale) {
                write_z(s, pixels, [](float, float d) { return d; });
                store_z(s, params.z_scale, pixels);
                __syncthreads();
            }
            write_z(s, pixels, [](float v, float d) { return d * v; });
        }
        if (params.z) store_z(s, params.z, pixels);
        if (!kFeatures && (kNmf || kChunks) && params.z_after) {
            store_dense(
                z, static_cast<Z*>(params.z_after) + (item.image * p.pixels + s.pixel) * padded,
                pixels, padded);
        }
        if constexpr (kRound) {
            partial.template add<!kTransposed, false>(x, z, kPixels, padded_16(channels), padded);
            if constexpr (kNmf) {
                gram_partial.template add<false, false>(z, z, kPixels, padded, padded);
            } else if (threadIdx.x < padded) {
#pragma unroll 4
                for (int n = 0; n < pixels; ++n) row_sum += to_float(*z.at(n, threadIdx.x));
            }
        } else if constexpr (kFeatures) {
            reconstruct(Features(), s, slot, pixels);
        }
    };

    pipeline(item.tiles * per_tile, params.stages, load, compute);
    const int64_t index = item.image * params.work.ranges + item.range;
    if constexpr (kRound) {
        partial.for_each_pair([&](int c, int k, float& v, float& w) {
            if (c >= channels || k >= padded) return;
            float* const to = params.partials + (index * p.channels + c) * padded + k;
            *reinterpret_cast<Two*>(to) = {v, w};
        });
        if constexpr (kNmf) {
            gram_partial.for_each_pair([&](int l, int k, float& v, float& w) {
                if (l >= padded || k >= padded) return;
                *reinterpret_cast<Two*>(params.sums + (index * padded + l) * padded + k) = {v, w};
            });
        } else if (threadIdx.x < padded) {
            params.sums[index * padded + threadIdx.x] = row_sum;
        }
    } else if constexpr (kFeatures) {
        error = block_sum(error);
        if (threadIdx.x == 0) params.errors[blockIdx.x] = error;
    }
}

}  // namespace mfops::cuda
