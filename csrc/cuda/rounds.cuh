// A round of a method's updates on a tile of X's columns: the tile's Z, from it the tile's share of
// X Z^T and of Z's row sums (em, vq, cd) or of Z Z^T (nmf). Or, with nmf, what follows the last
// round: the final Z, X' = Y Z and its error.
#pragma once

#include "cuda/columns.cuh"

namespace mfops::cuda {

enum class Family { kMeans, kNmf };       // em, vq and cd; nmf
enum class Ending { kRound, kFeatures };  // a share of what Y is updated from; X'

// What columns of Y are to be divided by before they meet X: not at all, 1e-6 + their length, or
// their length where that is larger than 1e-6.
enum class Division { kNone, kSum, kMaximum };

inline constexpr float kEps = 1e-6f;

struct RoundParams {
    FactorProblem problem;
    ColumnWork work;
    int stages;
    bool whole;
    const void* bases;  // (B, C, padded)
    Division division;
    const float* squares;  // (B, slices, padded): parts of the squared lengths of Y's columns
    int slices;
    const float* factors;  // (B, padded): columns of Y are those of `bases` times these
    bool cosines;          // columns of X are divided by their lengths, S is multiplied by 100
    bool first;            // nmf: Z starts here, as a softmax
    const void* gram;      // nmf: Y^T Y, (B, padded, padded)
    const void* z_before;  // nmf: (B, N, padded)
    void* z_after;
    float* shares;    // (B, ranges, C, padded)
    float* sums;      // (B, ranges, padded), nmf: (B, ranges, padded, padded)
    void *z, *slope;  // (B, K, N); null: not wanted
    void* x_hat;
    double* errors;  // one for each block
};

struct alignas(8) Two {
    float first, second;
};

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
    for (int i = 0; i < count; ++i) sum += parts[i * stride];
    return sum;
}

// Places in shared memory, in elements from its beginning.
template <Type kType, bool kTransposed, Family kFamily, int kOwn, int kPixels>
struct RoundPlaces {
    using T = Element<kType>;
    using X = ChunkTile<T, kTransposed, kOwn, kPixels>;
    static constexpr int kSoftLanes = kThreads / kPixels;  // that share a pixel
    static constexpr int kPerFloat = sizeof(float) / sizeof(T);

    int padded, stages, channels;
    bool whole, two = false;

    __host__ __device__ constexpr int pitch() const { return base_pitch<T>(padded); }
    __host__ __device__ constexpr int scores_pitch() const { return padded + 4; }
    __host__ __device__ constexpr bool keeps_gram() const {
        return kFamily == Family::kNmf && whole;
    }
    __host__ __device__ constexpr int bases() const { return 0; }
    __host__ __device__ constexpr int gram() const {
        return whole ? padded_16(channels) * pitch() : 0;
    }
    __host__ __device__ constexpr int stage(int slot) const {
        return gram() + (keeps_gram() ? padded * pitch() : 0) +
               slot * (X::kElements + (whole ? 0 : kOwn * pitch()));
    }
    // The bases of a chunk that is not kept, and in turn parts of the Gram matrix.
    __host__ __device__ constexpr int streamed(int slot) const {
        return stage(slot) + X::kElements;
    }
    // nmf: one for each tile that may be on its way or in use.
    __host__ __device__ constexpr int z_tiles() const {
        return kFamily == Family::kNmf ? stages : 1;
    }
    __host__ __device__ constexpr int z(int slot) const {
        return stage(stages) + slot * kPixels * pitch();
    }
    // float32: the scores become coefficients where they lie.
    __host__ __device__ constexpr int scores(int slot) const {
        return kPerFloat == 1 ? z(slot) : z(z_tiles());
    }
    __host__ __device__ constexpr int scale() const {
        return z(z_tiles()) + (kPerFloat == 1 ? 0 : kPixels * scores_pitch() * kPerFloat);
    }
    __host__ __device__ constexpr int squares() const { return scale() + padded * kPerFloat; }
    __host__ __device__ constexpr int elements() const { return squares() + kThreads * kPerFloat; }
};

template <class T>
__device__ __forceinline__ float* floats_at(int element) {
    return reinterpret_cast<float*>(reinterpret_cast<T*>(shared_memory()) + element);
}

// Writes a tile's coefficients (lines are pixels) to (K, N) in the tensor's own order.
template <int kPixels, class T>
__device__ __forceinline__ void store_coefficients(const Tile<T, true>& tile, void* to,
                                                   const FactorProblem& p, int64_t image,
                                                   int64_t pixel, int pixels) {
    T* const out = static_cast<T*>(to) + image * p.rank * p.pixels + pixel;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.rank * kPixels; i += kThreads) {
        const int basis = i / kPixels, n = i % kPixels;
        if (n < pixels) out[basis * p.pixels + n] = *tile.at(n, basis);
    }
}

template <Type kType, bool kTransposed, Family kFamily, Ending kEnding, int kOwn, int kRank,
          int kPixels>
__global__ void __launch_bounds__(kThreads, 1)
    round_kernel(const __grid_constant__ RoundParams params) {
    using At = RoundPlaces<kType, kTransposed, kFamily, kOwn, kPixels>;
    using T = typename At::T;
    using X = typename At::X;
    using C = Columns<kOwn, kPixels>;
    constexpr bool kNmf = kFamily == Family::kNmf, kRound = kEnding == Ending::kRound;
    const FactorProblem& p = params.problem;
    const ColumnWork& work = params.work;
    const int padded = padded_16(p.rank);
    const At at{padded, params.stages, static_cast<int>(p.channels), params.whole};
    const ColumnItem item = C::item(p, work, blockIdx.x);
    const T* const bases = static_cast<const T*>(params.bases) + item.image * p.channels * padded;
    const T* const gram = static_cast<const T*>(params.gram) + item.image * padded * padded;
    const bool owns_z = item.group == 0;  // writes what all groups of a tile know

    float* const scale = floats_at<T>(at.scale());
    for (int k = threadIdx.x; k < padded; k += kThreads) {
        const float squares =
            sum_of(params.squares + (item.image * params.slices) * padded + k,
                   params.division == Division::kNone ? 0 : params.slices, padded);
        scale[k] = params.factors[item.image * padded + k] / divisor(params.division, squares);
    }

    const auto bases_tile = [&](int step, const ColumnStep& s) {
        return Tile<T, true>{
            params.whole ? at.bases() + s.channel * at.pitch() : at.streamed(step % params.stages),
            at.pitch()};
    };
    const auto load_bases = [&](int step, const ColumnStep& s) {
        load_dense(bases_tile(step, s), bases + static_cast<int64_t>(s.channel) * padded,
                   padded_16(s.channels), padded, s.channels);
    };
    const auto z_tile = [&](const ColumnStep& s) {
        return Tile<T, true>{at.z(s.tile % at.z_tiles()), at.pitch()};
    };

    const auto load = [&](int step) {
        const ColumnStep s = C::step(p, work, item, step);
        X::load(at.stage(step % params.stages), p.x, item.image, s.channel, s.channels, s.pixel,
                p.pixels);
        if (!params.whole || step < work.chunks) load_bases(step, s);
        if constexpr (kNmf) {
            if (step == 0 && params.whole) {
                load_dense(Tile<T, true>{at.gram(), at.pitch()}, gram, padded, padded, padded);
            }
            if (s.first && !params.first) {
                load_dense(z_tile(s),
                           static_cast<const T*>(params.z_before) +
                               (item.image * p.pixels + s.pixel) * padded,
                           kPixels, padded, within(p.pixels - s.pixel, kPixels));
            }
        }
    };

    // Those of the other ending: of any shape that the warps can share.
    constexpr int kLines = kTransposed ? kPixels : kOwn, kLength = kTransposed ? kOwn : kPixels;
    using Features = Accumulators<kType, kRound ? 128 : kLines, kRound ? 16 : kLength, kWarps>;
    // float16 has too small a range for a softmax's coefficients: a base that no pixel comes close
    // to would lose its own, and its mean with them. They are left in float32 and multiplied as
    // TF32.
    constexpr bool kWide = kType == Type::kF16 && !kNmf;
    using Share =
        Accumulators<kWide ? Type::kTf32 : kType, kRound ? kOwn : 128, kRound ? kRank : 16, kWarps>;
    constexpr bool kGram = kRound && kNmf;
    using Gram = Accumulators<kType, kGram ? kGramRows : 128, kGram ? kRank : 16, kWarps>;
    Accumulators<kType, kPixels, kRank, kWarps> scores, denominators;
    float squares = 0, row_sum = 0;
    double error = 0;

    // Softmax over the bases of each of the tile's pixels, into the tile's Z.
    const auto soften = [&](const ColumnStep& s, int pixels) {
        float* const rows = floats_at<T>(at.scores(s.tile % at.z_tiles()));
        scores.for_each_pair([&](int n, int k, float& v, float& w) {
            if (k >= padded) return;
            rows[n * at.scores_pitch() + k] = v * scale[k];
            rows[n * at.scores_pitch() + k + 1] = w * scale[k + 1];
        });
        float* const parts = floats_at<T>(at.squares());
        parts[threadIdx.x] = squares;
        __syncthreads();
        const int n = threadIdx.x / At::kSoftLanes, lane = threadIdx.x % At::kSoftLanes;
        float* const row = rows + n * at.scores_pitch();
        float factor = 1;
        if (params.cosines) {
            factor = 100 / fmaxf(sqrtf(sum_of(parts + n, At::kSoftLanes, kPixels)), 1e-12f);
        }
        float largest = -INFINITY, sum = 0;
        for (int k = lane; k < p.rank; k += At::kSoftLanes) largest = fmaxf(largest, row[k]);
        for (int offset = At::kSoftLanes / 2; offset > 0; offset /= 2) {
            largest = fmaxf(largest, shuffle_xor(largest, offset));
        }
        for (int k = lane; k < p.rank; k += At::kSoftLanes) {
            sum += row[k] = expf(factor * (row[k] - largest));
        }
        for (int offset = At::kSoftLanes / 2; offset > 0; offset /= 2) {
            sum += shuffle_xor(sum, offset);
        }
        const auto z = z_tile(s);
        for (int k = lane; k < padded; k += At::kSoftLanes) {
            const float value = n < pixels && k < p.rank ? row[k] / sum : 0;
            *z.at(n, k) = from_float<T>(value);
            if (kWide) row[k] = value;
        }
        __syncthreads();
    };

    // Y^T Y Z of the tile's Z.
    const auto denominate = [&](int step, const ColumnStep& s) {
        denominators.zero();
        const int rows = params.whole ? padded : kOwn;
#pragma unroll 1
        for (int first = 0; first < padded; first += rows) {
            const int count = min(rows, padded - first);
            const Tile<T, true> part{params.whole ? at.gram() : at.streamed(step % params.stages),
                                     at.pitch()};
            if (!params.whole) {
                load_dense(part, gram + first * padded, count, padded, count);
                cp_async_commit();
                cp_async_wait<0>();
                __syncthreads();
            }
            const auto z = z_tile(s);
            denominators.template add<true, false>(Tile<T, true>{z.start + first, z.pitch}, part,
                                                   count, kPixels, padded);
            __syncthreads();
        }
    };

    // f(z, score, denominator) for every coefficient of the tile, in place.
    const auto update = [&](const ColumnStep& s, int pixels, auto f) {
        const auto z = z_tile(s);
        scores.for_each_pair_with(
            denominators, [&](int n, int k, float& v, float& w, float& d, float& e) {
                if (k >= padded) return;
                const Pair<T> pair = read_pair(z, n, k);
                const float a = f(to_float(pair.first), v, d), b = f(to_float(pair.second), w, e);
                write_pair(z, n, k, n < pixels ? a : 0, n < pixels ? b : 0);
            });
        __syncthreads();
    };

    // Z and Y's product for the own channels, X' in X's place, and the error.
    const auto reconstruct = [&](int step, const ColumnStep& s, int x_start, int pixels) {
        if (!params.whole) {  // the Gram matrix passed through the place of the bases
            load_bases(step, s);
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
        }
        Features features;
        const int channels = padded_16(s.channels);
        if constexpr (kTransposed) {
            features.template add<true, true>(z_tile(s), bases_tile(step, s), padded, kPixels,
                                              channels);
        } else {
            features.template add<true, true>(bases_tile(step, s), z_tile(s), padded, channels,
                                              kPixels);
        }
        const auto x = X::tile(x_start);
        const int line_end = kTransposed ? pixels : s.channels;
        const int end = kTransposed ? s.channels : pixels;
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
        X::store(x_start, params.x_hat, p, item.image, s.channel, s.channels, s.pixel);
    };

    Share share;
    Gram gram_share;
    const int gram_first = item.group * kGramRows;

    const auto compute = [&](int step) {
        const ColumnStep s = C::step(p, work, item, step);
        const int x_start = at.stage(step % params.stages);
        const int pixels = within(p.pixels - s.pixel, kPixels);
        if (X::settle(x_start, p.x, item.image, s.channel, s.channels, s.pixel)) __syncthreads();
        const auto x = X::tile(x_start);
        if (s.first) {
            scores.zero();
            squares = 0;
        }
        scores.template add<kTransposed, false>(x, bases_tile(step, s), padded_16(s.channels),
                                                kPixels, padded);
        if constexpr (!kNmf) {
            if (params.cosines) {
                const int n = threadIdx.x % kPixels;
                for (int c = threadIdx.x / kPixels; c < s.channels; c += At::kSoftLanes) {
                    const float v = to_float(kTransposed ? *x.at(n, c) : *x.at(c, n));
                    squares += v * v;
                }
            }
        }
        if (!s.last) return;

        if (!kNmf || params.first) soften(s, pixels);
        if constexpr (kNmf) {
            if (!params.whole) __syncthreads();  // the Gram matrix takes the place of the bases
            denominate(step, s);
        }
        if constexpr (kNmf && kRound) {
            update(s, pixels, [](float z, float v, float d) { return z * v / (d + kEps); });
        } else if constexpr (kNmf) {
            update(s, pixels, [](float z, float, float& d) { return d = z / (d + kEps); });
            if (owns_z) {
                store_coefficients<kPixels>(z_tile(s), params.slope, p, item.image, s.pixel,
                                            pixels);
            }
            __syncthreads();
            update(s, pixels, [](float, float v, float d) { return d * v; });
        }
        const auto z = z_tile(s);
        if (owns_z && params.z)
            store_coefficients<kPixels>(z, params.z, p, item.image, s.pixel, pixels);
        if constexpr (kRound) {
            if (kNmf && owns_z) {
                store_dense(
                    z, static_cast<T*>(params.z_after) + (item.image * p.pixels + s.pixel) * padded,
                    pixels, padded);
            }
            const auto operand = [&] {
                if constexpr (!kWide)
                    return z;
                else
                    return Tile<float, true>{at.scores(0) / At::kPerFloat, at.scores_pitch()};
            }();
            share.template add<!kTransposed, false>(x, operand, kPixels, padded_16(item.channels),
                                                    padded);
            if constexpr (kNmf) {
                if (gram_first < padded) {
                    gram_share.template add<false, false>(
                        Tile<T, true>{z.start + gram_first, z.pitch}, z, kPixels,
                        padded - gram_first, padded);
                }
            } else if (threadIdx.x < padded) {
#pragma unroll 4
                for (int n = 0; n < pixels; ++n) row_sum += to_float(*operand.at(n, threadIdx.x));
            }
        } else if (item.channels > 0) {
            reconstruct(step, s, x_start, pixels);
        }
    };

    pipeline(item.tiles * work.chunks, params.stages, load, compute);
    const int64_t index = item.image * work.ranges + item.range;
    if constexpr (kRound) {
        share.for_each_pair([&](int c, int k, float& v, float& w) {
            if (c >= item.channels || k >= padded) return;
            float* const to = params.shares + (index * p.channels + item.own + c) * padded + k;
            *reinterpret_cast<Two*>(to) = {v, w};
        });
        if constexpr (kNmf) {
            gram_share.for_each_pair([&](int l, int k, float& v, float& w) {
                if (gram_first + l >= padded || k >= padded) return;
                float* const to = params.sums + (index * padded + gram_first + l) * padded + k;
                *reinterpret_cast<Two*>(to) = {v, w};
            });
        } else if (owns_z && threadIdx.x < padded) {
            params.sums[index * padded + threadIdx.x] = row_sum;
        }
    } else {
        error = block_sum(error);
        if (threadIdx.x == 0) params.errors[blockIdx.x] = error;
    }
}

}  // namespace mfops::cuda
