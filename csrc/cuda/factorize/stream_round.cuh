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
struct PixelScores {
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
        return parts() + 2 * PixelScores<kType, kRank, kPixels>::kParts * kPerFloat;
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

// The phases of a block's work on a tile. Accumulators are the kernel's own variables: as members
// they would keep all others from registers while the compiler unrolls the loops over them.
template <Type kType, bool kTransposed, Family kFamily, Epilogue kEpilogue, int kOwn, int kRank,
          int kPixels>
struct RoundBlock {
    using Layout = RoundLayout<kType, kTransposed, kFamily, kEpilogue, kOwn, kRank, kPixels>;
    using T = typename Layout::T;
    using X = typename Layout::X;
    using Z = typename Layout::Z;
    using S = PixelScores<kType, kRank, kPixels>;
    using Scores = typename S::Product;
    static constexpr bool kNmf = Layout::kNmf, kChunks = Layout::kChunks;
    static constexpr bool kRound = kEpilogue == Epilogue::kRound;
    static constexpr bool kFeatures = kEpilogue == Epilogue::kFeatures;
    // Those of other epilogues: of any shape that the warps can share.
    using Product = Accumulators<kProductType<kType, kWide<kType, kFamily>>, kRound ? kOwn : 128,
                                 kRound ? kRank : 16, kWarps>;
    using Gram =
        Accumulators<kType, kRound && kNmf ? kRank : 128, kRound && kNmf ? kRank : 16, kWarps>;

    const RoundParams& params;
    const FactorProblem& p = params.problem;
    const int padded = padded_16(p.rank), channels = static_cast<int>(p.channels);
    const Layout layout{padded, params.stages, channels};
    const ColumnItem item = item_of(params.work, p.batch, 1, blockIdx.x);
    const T* const bases = static_cast<const T*>(params.bases) + item.image * p.channels * padded;
    const T* const gram = static_cast<const T*>(params.gram) + item.image * padded * padded;
    float* const scale = floats_at<T>(layout.scale());
    const int chunks = kChunks ? params.work.chunks : 1;
    const int per_tile = chunks + (kChunks && kNmf ? (padded + kOwn - 1) / kOwn : 0);

    // What columns of Y are multiplied by.
    __device__ __forceinline__ void load_scale() const {
        for (int k = threadIdx.x; k < padded; k += kThreads) {
            const float squares =
                sum_of(params.squares + (item.image * params.slices) * padded + k,
                       params.division == Division::kNone ? 0 : params.slices, padded);
            scale[k] = params.factors[item.image * padded + k] / divisor(params.division, squares);
        }
    }

    __device__ __forceinline__ RoundStep step_of(int step) const {
        const int tile = step / per_tile, chunk = step - tile * per_tile;
        const bool gram = chunk >= chunks;
        const int first = (gram ? chunk - chunks : chunk) * kOwn;
        return RoundStep{.tile = tile,
                         .chunk = chunk,
                         .gram = gram,
                         .pixel = static_cast<int64_t>(item.first_tile + tile) * kPixels,
                         .first = first,
                         .count = min((gram ? padded : channels) - first, kOwn)};
    }
    // The rows of Y, or of Y^T Y, that a step multiplies by.
    __device__ __forceinline__ Tile<T> rows_tile(int slot) const {
        return {kChunks ? layout.streamed(slot) : layout.bases(), layout.pitch()};
    }
    __device__ __forceinline__ Tile<T> gram_tile() const { return {layout.gram(), layout.pitch()}; }
    __device__ __forceinline__ Tile<Z> z_tile(const RoundStep& s) const {
        return {layout.z(s.tile % layout.z_tiles()) / Layout::kPerZ, layout.z_pitch()};
    }

    __device__ __forceinline__ void load(int step, int slot) const {
        const RoundStep s = step_of(step);
        if (!s.gram) {
            X::load(layout.stage(slot), p.x, item.image, s.first, s.count, s.pixel, p.pixels);
        }
        if (kChunks || step == 0) {
            load_dense(rows_tile(slot), (s.gram ? gram : bases) + int64_t{s.first} * padded,
                       padded_16(s.count), padded, s.count);
        }
        if constexpr (kNmf) {
            if (!kChunks && step == 0) load_dense(gram_tile(), gram, padded, padded, padded);
            if (s.chunk == (kChunks ? chunks : 0) && !params.first) {
                load_dense(z_tile(s),
                           static_cast<const Z*>(params.z_before) +
                               (item.image * p.pixels + s.pixel) * padded,
                           kPixels, padded, within(p.pixels - s.pixel, kPixels));
            }
        }
    }

    // Y^T X of a chunk of the channels and, of vq and cd, X's squares.
    __device__ __forceinline__ void add_scores(const RoundStep& s, int slot, Scores& scores,
                                               float& squares) const {
        const int x_start = layout.stage(slot);
        const auto x = X::tile(x_start);
        if (X::align_lines(x_start, p.x, item.image, s.first, s.count, s.pixel)) __syncthreads();
        if (s.chunk == 0) {
            scores.zero();
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
    }

    // Softmax over the bases of each of the tile's pixels, into the tile's Z. Takes the scores'
    // place. `squares`: a thread's part of those of X.
    __device__ __forceinline__ void soften(const Tile<Z>& z, int pixels, Scores& scores,
                                           float squares) const {
        float factor[S::kOwn], largest[S::kOwn], sum[S::kOwn];
#pragma unroll
        for (int i = 0; i < S::kOwn; ++i) factor[i] = 1, largest[i] = -INFINITY, sum[i] = 0;
        if (params.inverse_temperature > 0) {
            float* const parts = floats_at<T>(layout.squares());
            parts[threadIdx.x] = squares;
            __syncthreads();
#pragma unroll
            for (int i = 0; i < S::kOwn; ++i) {
                const float all = sum_of(parts + S::pixel(i), kThreads / kPixels, kPixels);
                factor[i] = params.inverse_temperature / fmaxf(sqrtf(all), 1e-12f);
            }
        }
        float* const parts = floats_at<T>(layout.parts());
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
        S::for_each_pair(scores, [&](int i, int k, float& v, float& w) {
            if (k < padded) write_pair(z, S::pixel(i), k, v * sum[i], w * sum[i]);
        });
        __syncthreads();
    }

    // Adds Y^T Y Z, or what a chunk of the rows of Y^T Y gives of it.
    __device__ __forceinline__ void add_denominators(const RoundStep& s, int slot, const Tile<Z>& z,
                                                     Scores& denominators) const {
        if constexpr (kChunks) {
            denominators.template add<true, false>(Tile<Z>{z.start + s.first, z.pitch},
                                                   rows_tile(slot), s.count, kPixels, padded);
        } else {
            denominators.template add<true, false>(z, gram_tile(), padded, kPixels, padded);
        }
    }

    // f(score, denominator) in the place of Z, for all of the tile.
    template <class F>
    __device__ __forceinline__ void write_z(const Tile<Z>& z, int pixels, Scores& scores,
                                            Scores& denominators, F f) const {
        scores.for_each_pair_with(
            denominators, [&](int n, int k, float& v, float& w, float d, float e) {
                if (k >= padded) return;
                write_pair(z, n, k, n < pixels ? f(v, d) : 0, n < pixels ? f(w, e) : 0);
            });
        __syncthreads();
    }
    __device__ __forceinline__ void store_z(const RoundStep& s, const Tile<Z>& z, void* to,
                                            int pixels) const {
        store_coefficients<kPixels>(z, static_cast<T*>(to), p, item.image, s.pixel, pixels);
    }

    // For the next round, or for the kernel that multiplies by Z.
    __device__ __forceinline__ void store_z_after(const RoundStep& s, const Tile<Z>& z,
                                                  int pixels) const {
        store_dense(z, static_cast<Z*>(params.z_after) + (item.image * p.pixels + s.pixel) * padded,
                    pixels, padded);
    }

    // nmf: Z times scores / denominators.
    __device__ __forceinline__ void update_z(const RoundStep& s, const Tile<Z>& z, int pixels,
                                             Scores& scores, Scores& denominators) const {
        __syncthreads();
        scores.for_each_pair_with(denominators,
                                  [&](int n, int k, float&, float&, float& d, float& e) {
                                      if (k >= padded) return;
                                      const Pair<Z> pair = read_pair(z, n, k);
                                      d = to_float(pair.first) / (d + kEps);
                                      e = to_float(pair.second) / (e + kEps);
                                  });
        if (!kRound && params.z_scale) {
            write_z(z, pixels, scores, denominators, [](float, float d) { return d; });
            store_z(s, z, params.z_scale, pixels);
            __syncthreads();
        }
        write_z(z, pixels, scores, denominators, [](float v, float d) { return d * v; });
    }

    // The tile's part of what Y is updated from.
    __device__ __forceinline__ void add_partial_sums(const Tile<Z>& z, int slot, int pixels,
                                                     Product& x_z, Gram& z_z,
                                                     float& row_sum) const {
        x_z.template add<!kTransposed, false>(X::tile(layout.stage(slot)), z, kPixels,
                                              padded_16(channels), padded);
        if constexpr (kNmf) {
            z_z.template add<false, false>(z, z, kPixels, padded, padded);
        } else {  // threads side by side have bases side by side, and share the pixels
            const int groups = kThreads / padded, group = threadIdx.x / padded;
            if (group == groups) return;
            for (int n = group; n < pixels; n += groups) {
                row_sum += to_float(*z.at(n, threadIdx.x % padded));
            }
        }
    }

    // Z and Y's product, X' in X's place and then in the result; returns the squared error.
    __device__ __forceinline__ float reconstruct(const RoundStep& s, const Tile<Z>& z, int slot,
                                                 int pixels) const {
        Accumulators<kType, kTransposed ? kPixels : kOwn, kTransposed ? kOwn : kPixels, kWarps>
            features;
        if constexpr (kTransposed) {
            features.template add<true, true>(z, rows_tile(slot), padded, kPixels,
                                              padded_16(channels));
        } else {
            features.template add<true, true>(rows_tile(slot), z, padded, padded_16(channels),
                                              kPixels);
        }
        const auto x = X::tile(layout.stage(slot));
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
        __syncthreads();
        X::store(layout.stage(slot), params.x_hat, p, item.image, 0, channels, s.pixel);
        return sum;
    }

    // What the block leaves for the kernel that updates Y.
    __device__ __forceinline__ void store_partial_sums(Product& x_z, Gram& z_z,
                                                       float row_sum) const {
        const int64_t index = item.image * params.work.ranges + item.range;
        x_z.for_each_pair([&](int c, int k, float& v, float& w) {
            if (c >= channels || k >= padded) return;
            float* const to = params.partials + (index * p.channels + c) * padded + k;
            *reinterpret_cast<Two*>(to) = {v, w};
        });
        if constexpr (kNmf) {
            z_z.for_each_pair([&](int l, int k, float& v, float& w) {
                if (l >= padded || k >= padded) return;
                *reinterpret_cast<Two*>(params.sums + (index * padded + l) * padded + k) = {v, w};
            });
        } else {
            float* const parts = floats_at<T>(layout.squares());
            parts[threadIdx.x] = row_sum;
            __syncthreads();
            if (threadIdx.x >= padded) return;
            params.sums[index * padded + threadIdx.x] =
                sum_of(parts + threadIdx.x, kThreads / padded, padded);
        }
    }
};

template <Type kType, bool kTransposed, Family kFamily, Epilogue kEpilogue, int kOwn, int kRank,
          int kPixels>
__global__ void __launch_bounds__(kThreads, 1)
    round_kernel(const __grid_constant__ RoundParams params) {
    using Block = RoundBlock<kType, kTransposed, kFamily, kEpilogue, kOwn, kRank, kPixels>;
    constexpr bool kNmf = Block::kNmf, kChunks = Block::kChunks;
    const Block block{params};
    block.load_scale();
    // Of a tile.
    typename Block::Scores scores, denominators;
    float squares = 0;
    // Of all the tiles: X Z^T and, of nmf, Z Z^T, else the sum of a row of Z; or the error.
    typename Block::Product x_z;
    typename Block::Gram z_z;
    float row_sum = 0;
    double error = 0;

    const auto load = [&](int step, int slot) { block.load(step, slot); };
    const auto compute = [&](int step, int slot) {
        const RoundStep s = block.step_of(step);
        const int pixels = within(block.p.pixels - s.pixel, kPixels);
        const auto z = block.z_tile(s);
        if (!s.gram) {
            if (s.chunk == 0) denominators.zero();
            block.add_scores(s, slot, scores, squares);
            if (s.chunk + 1 < block.chunks) return;
            if constexpr (!kNmf) {
                block.soften(z, pixels, scores, squares);
            } else if (params.first) {
                denominators = scores;
                block.soften(z, pixels, denominators, squares);
                denominators.zero();
            }
        }
        if constexpr (kNmf) {
            if (kChunks && !s.gram) return;
            block.add_denominators(s, slot, z, denominators);
            if (kChunks && s.chunk + 1 < block.per_tile) return;
            block.update_z(s, z, pixels, scores, denominators);
        }
        if (params.z) block.store_z(s, z, params.z, pixels);
        if (kEpilogue != Epilogue::kFeatures && (kNmf || kChunks) && params.z_after) {
            block.store_z_after(s, z, pixels);
        }
        if constexpr (kEpilogue == Epilogue::kRound) {
            block.add_partial_sums(z, slot, pixels, x_z, z_z, row_sum);
        } else if constexpr (kEpilogue == Epilogue::kFeatures) {
            error += block.reconstruct(s, z, slot, pixels);
        }
    };

    pipeline(block.item.tiles * block.per_tile, params.stages, load, compute);
    if constexpr (kEpilogue == Epilogue::kRound) {
        block.store_partial_sums(x_z, z_z, row_sum);
    } else if constexpr (kEpilogue == Epilogue::kFeatures) {
        error = block_sum(error);
        if (threadIdx.x == 0) params.errors[blockIdx.x] = error;
    }
}

}  // namespace mfops::cuda
