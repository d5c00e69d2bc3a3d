// All rounds of nmf on 16-bit features, or of em on bfloat16 ones, in one launch: a cluster of
// eight blocks keeps an image's X in its shared memory, so X is read once. From compute
// capability 9.0 on.
//
// Each block has its part of the columns of X and Z, and all of Y as an operand. What a round adds
// up over all columns (X Z^T, Z's row sums, Z Z^T) meets through the cluster's shared memory: in
// the place of Y, which by then is no longer needed, every block lays its sums, half of the
// channels at a time; each block adds, in order, the eight sums of the channels it owns, updates Y
// there, and writes its part of the new Y to all blocks. In float32 Y rests in the result's memory.
//
// X, Y and Z lie without padding, their 16-byte granules exchanged within each line so that a
// fragment's lines come from different banks: (512, 1089, 64) takes 231,936 of the 232,448 bytes
// that a block has.
#pragma once

#include "cuda/rounds.cuh"
#include "cuda/swizzled.cuh"

namespace mfops::cuda {

inline constexpr int kCluster = 8, kResidentWarps = 16, kResidentThreads = 32 * kResidentWarps;
inline constexpr int kMostChannels = 512, kMostRank = 64, kMostSpan = 256;

__host__ __device__ constexpr int padded_32(int n) { return (n + 31) / 32 * 32; }

struct ResidentParams {
    FactorProblem problem;
    int span;  // columns that a block has room for, whole 16s
    int steps;
    bool solve;       // not the rounds alone
    Lines start;      // y0 in float32: lines are channels
    float* y;         // (B, C, K)
    void *z, *slope;  // (B, K, N)
    void* x_hat;
    double* errors;  // one for each block
};

// Places in shared memory, in bytes.
struct ResidentPlaces {
    static constexpr int kElement = 2;
    int channels, padded, span;  // channels in whole 32s, bases in whole 16s

    __host__ __device__ constexpr int half() const { return channels / 2; }
    // Channels of each half that a block owns.
    __host__ __device__ constexpr int owned() const { return (half() + kCluster - 1) / kCluster; }
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
    __host__ __device__ constexpr int bytes() const {
        return squares() + padded * static_cast<int>(sizeof(float));
    }
};

struct Four {
    float v[4];
};
__device__ __forceinline__ Four load_four_of(const float* from, unsigned rank) {
    uint4 bits;
    load_cluster(bits, from, rank);
    return {as_float(bits.x), as_float(bits.y), as_float(bits.z), as_float(bits.w)};
}
// Four floats of every block of the cluster, added in order.
__device__ __forceinline__ Four sum_of_blocks(const float* from) {
    Four sum{};
#pragma unroll 2
    for (unsigned rank = 0; rank < kCluster; ++rank) {
        const Four part = load_four_of(from, rank);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.v[i] += part.v[i];
    }
    return sum;
}
// Four neighbouring elements to the same place in every block of the cluster.
template <class T>
__device__ __forceinline__ void store_in_blocks(T* to, const Four& four) {
    const auto pair = [](float low, float high) {
        return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
    };
    for (unsigned rank = 0; rank < kCluster; ++rank) {
        store_cluster(to, rank, uint2{pair(four.v[0], four.v[1]), pair(four.v[2], four.v[3])});
    }
}

// The scores of a block's pixels. A warp has all bases of its pixels, in two parts, so that what is
// under the coefficients takes registers for one part at a time.
template <Type kType>
struct ResidentScores {
    static constexpr int kPart = kMostRank / 2;
    using Part = Accumulators<kType, kMostSpan, kPart, kResidentWarps, WarpGrid{kResidentWarps, 1}>;
    Part parts[2];

    template <class F>
    __device__ __forceinline__ void for_each_pair(F f) {
        parts[0].for_each_pair(f);
        parts[1].for_each_pair([&](int n, int k, float& v, float& w) { f(n, k + kPart, v, w); });
    }
};

template <Type kType, bool kTransposed, Family kFamily>
__device__ __forceinline__ void resident(const ResidentParams& params) {
    using T = Element<kType>;
    constexpr bool kNmf = kFamily == Family::kNmf;
    const FactorProblem& p = params.problem;
    const int channels = static_cast<int>(p.channels);
    const ResidentPlaces at{padded_32(channels), padded_16(p.rank), params.span};
    const int padded = at.padded, span = at.span;
    const int64_t image = blockIdx.x / kCluster;
    const unsigned rank = cluster_rank();
    // The image's 16s of columns, dealt out.
    const int tiles = static_cast<int>((p.pixels + 15) / 16);
    const int first_tile = tiles * static_cast<int>(rank) / kCluster;
    const int64_t pixel = static_cast<int64_t>(first_tile) * 16;
    const int count = (tiles * (static_cast<int>(rank) + 1) / kCluster - first_tile) * 16;
    const int pixels = within(p.pixels - pixel < 0 ? 0 : p.pixels - pixel, count);

    const auto floats = [](int byte) { return reinterpret_cast<float*>(shared_memory() + byte); };
    const auto place = [](int byte) { return byte / static_cast<int>(sizeof(T)); };
    const auto x = Swizzled<T>::of(place(at.x()), kTransposed ? at.channels : span);
    const auto y = Swizzled<T>::of(place(at.y()), padded);
    const auto z = Swizzled<T>::of(place(at.z()), padded);
    const auto gram = Swizzled<T>::of(place(at.y()), padded);  // in the place of Y
    float* const sums = floats(at.y());
    float* const weights = floats(at.weights());
    float* const squares = floats(at.squares());

    fill_swizzled<kResidentThreads>(
        x, p.x, origin_of<T>(p.x, image, kTransposed ? pixel : 0, kTransposed ? 0 : pixel),
        kTransposed ? span : at.channels, kTransposed ? at.channels : span,
        kTransposed ? pixels : channels, kTransposed ? channels : pixels, kTransposed ? 0 : pixel);
    const auto start_at = [&](int channel, int basis) {
        return channel < channels && basis < p.rank
                   ? *origin_of<float>(params.start, image, channel, basis)
                   : 0;
    };
    for (int i = threadIdx.x; i < at.channels * padded; i += kResidentThreads) {
        const int channel = i / padded, basis = i - channel * padded;
        *y.at(channel, basis) = from_float<T>(start_at(channel, basis));
    }

    // This thread's own part of Y: four bases of a channel of each half. In float32 it rests in the
    // result's memory.
    const int fours = padded / 4, own_row = threadIdx.x / fours,
              own_basis = threadIdx.x % fours * 4;
    const int row_of_half = static_cast<int>(rank) * at.owned() + own_row;
    const bool owns = own_row < at.owned() && row_of_half < at.half();
    const auto channel_of = [&](int half) { return half * at.half() + row_of_half; };
    // f(value in memory, value here) for each element of what this thread owns.
    const auto for_own = [&](Four(&own)[2], auto f) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int channel = channel_of(half), basis = own_basis + j;
                if (!owns || channel >= channels || basis >= p.rank) continue;
                f(params.y[(image * p.channels + channel) * p.rank + basis], own[half].v[j]);
            }
        }
    };
    const auto keep_own = [&](Four(&own)[2]) {
        for_own(own, [](float& memory, float& value) { memory = value; });
    };
    {
        Four own[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (owns) own[half].v[j] = start_at(channel_of(half), own_basis + j);
            }
        }
        if (kNmf) keep_own(own);
    }
    cluster_sync();  // every block has begun

    using Scores = ResidentScores<kType>;
    using Part = typename Scores::Part;
    constexpr int kPart = Scores::kPart;
    using Square = Accumulators<kType, kMostRank, kMostRank, kResidentWarps>;

    // Z as a softmax of the scores: a row of them lies in four lanes.
    const auto soften = [&](Scores& scores) {
        float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
        scores.for_each_pair([&](int n, int k, float& v, float& w) {
            float& most = n & 8 ? largest[1] : largest[0];
            if (k < p.rank) most = fmaxf(most, v);
            if (k + 1 < p.rank) most = fmaxf(most, w);
        });
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            largest[i] = fmaxf(largest[i], shuffle_xor(largest[i], 1));
            largest[i] = fmaxf(largest[i], shuffle_xor(largest[i], 2));
        }
        const auto power = [&](int n, int k, float v) {
            return k < p.rank ? expf(v - (n & 8 ? largest[1] : largest[0])) : 0;
        };
        scores.for_each_pair([&](int n, int k, float& v, float& w) {
            (n & 8 ? sum[1] : sum[0]) += power(n, k, v) + power(n, k + 1, w);
        });
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            sum[i] += shuffle_xor(sum[i], 1);
            sum[i] += shuffle_xor(sum[i], 2);
        }
        scores.for_each_pair([&](int n, int k, float& v, float& w) {
            if (n >= span || k >= padded) return;
            const float whole = n & 8 ? sum[1] : sum[0];
            write_pair(z.pair(n, k), 0, 0, n < pixels ? power(n, k, v) / whole : 0,
                       n < pixels ? power(n, k + 1, w) / whole : 0);
        });
    };

    // The scores Y^T X.
    const auto score = [&](Scores& scores) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            scores.parts[i].template add<kTransposed, false>(x, y.from(0, i * kPart), at.channels,
                                                             span, padded - i * kPart);
        }
    };
    // Y^T Y in the place of Y.
    const auto place_gram = [&] {
        Square product;
        product.template add<false, false>(y, y, at.channels, padded, padded);
        __syncthreads();
        product.for_each_pair([&](int l, int k, float& v, float& w) {
            if (l < padded && k < padded) write_pair(gram.pair(l, k), 0, 0, v, w);
        });
        __syncthreads();
    };
    // Z's next values: f(pixel, basis, z, score, what is under z) in the place of the scores, then
    // of Z, which both parts need as it was.
    const auto update = [&](Scores& scores, auto f) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            Part under;
            under.template add<true, false>(z, gram.from(0, i * kPart), padded, span,
                                            padded - i * kPart);
            scores.parts[i].for_each_pair_with(
                under, [&](int n, int k, float& v, float& w, float d, float e) {
                    k += i * kPart;
                    if (n >= span || k >= padded) return;
                    const Pair<T> pair = read_pair(z.pair(n, k), 0, 0);
                    v = f(n, k, to_float(pair.first), v, d);
                    w = f(n, k + 1, to_float(pair.second), w, e);
                });
        }
        __syncthreads();
        scores.for_each_pair([&](int n, int k, float& v, float& w) {
            if (n >= span || k >= padded) return;
            write_pair(z.pair(n, k), 0, 0, n < pixels ? v : 0, n < pixels ? w : 0);
        });
    };
    const auto store_z = [&](void* to) {
        T* const out = static_cast<T*>(to) + image * p.rank * p.pixels + pixel;
#pragma unroll 1
        for (int i = threadIdx.x; i < p.rank * pixels; i += kResidentThreads) {
            const int basis = i / pixels, n = i - basis * pixels;
            out[basis * p.pixels + n] = *z.at(n, basis);
        }
    };

    if constexpr (kNmf) {  // where Z starts
        Scores scores;
        score(scores);
        soften(scores);
    }
#pragma unroll 1
    for (int step = 0; step < params.steps; ++step) {
        {
            Scores scores;
            score(scores);
            if constexpr (kNmf) {
                place_gram();
                update(scores,
                       [](int, int, float c, float v, float d) { return c * v / (d + kEps); });
            } else {
                soften(scores);
            }
        }
        __syncthreads();
        if (!kNmf && threadIdx.x < padded) {
            float weight = 0;
            for (int n = 0; n < pixels; ++n) weight += to_float(*z.at(n, threadIdx.x));
            weights[threadIdx.x] = weight;
        }

        Four total[2];
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            const int first = half * at.half();
            Accumulators<kType, kMostChannels / 2, kMostRank, kResidentWarps,
                         WarpGrid{kResidentWarps, 1}>
                share;
            share.template add<!kTransposed, false>(
                x.from(kTransposed ? 0 : first, kTransposed ? first : 0), z, span, at.half(),
                padded);
            share.for_each_pair([&](int c, int k, float& v, float& w) {
                if (c >= at.half() || k >= padded) return;
                *reinterpret_cast<Two*>(sums + c * padded + k) = {v, w};
            });
            cluster_sync();
            if (owns) {
                const Four sum = sum_of_blocks(sums + row_of_half * padded + own_basis);
                if (half == 0) {
                    total[0] = sum;
                } else {
                    total[1] = sum;
                }
            }
            cluster_sync();
        }

        Four own[2] = {};
        if constexpr (kNmf) {
            Square gram_share;
            gram_share.template add<false, false>(z, z, span, padded, padded);
            gram_share.for_each_pair([&](int l, int k, float& v, float& w) {
                if (l >= padded || k >= padded) return;
                *reinterpret_cast<Two*>(sums + l * padded + k) = {v, w};
            });
            cluster_sync();
            constexpr int kEach = kMostRank * kMostRank / 4 / kResidentThreads;
            Four whole[kEach];
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                const int four = i * kResidentThreads + threadIdx.x;
                if (four < padded * fours) whole[i] = sum_of_blocks(sums + 4 * four);
            }
            cluster_sync();
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                const int four = i * kResidentThreads + threadIdx.x;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    if (four < padded * fours) sums[4 * four + j] = whole[i].v[j];
                }
            }
            for_own(own, [](float& memory, float& value) { value = memory; });
            float* const mine = sums + padded * padded;
            const auto row_at = [&](int half) {
                return mine + (half * at.owned() + own_row) * padded;
            };
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    if (owns) row_at(half)[own_basis + j] = own[half].v[j];
                }
            }
            __syncthreads();
            if (owns) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    Four below{};
#pragma unroll 1
                    for (int l = 0; l < padded; ++l) {
                        const float left = row_at(half)[l];
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            below.v[j] += left * sums[l * padded + own_basis + j];
                        }
                    }
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        own[half].v[j] = own[half].v[j] * total[half].v[j] / (below.v[j] + kEps);
                    }
                }
            }
            cluster_sync();  // what lies in the place of Y is done with, in every block
        } else {
            if (owns) {
                const Four weight = sum_of_blocks(weights + own_basis);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    own[0].v[j] = total[0].v[j] / (kEps + weight.v[j]);
                    own[1].v[j] = total[1].v[j] / (kEps + weight.v[j]);
                    sums[own_row * padded + own_basis + j] =
                        own[0].v[j] * own[0].v[j] + own[1].v[j] * own[1].v[j];
                }
            }
            __syncthreads();
            if (threadIdx.x < padded) {
                const int left = at.half() - static_cast<int>(rank) * at.owned();
                squares[threadIdx.x] =
                    sum_of(sums + threadIdx.x, min(max(left, 0), at.owned()), padded);
            }
            cluster_sync();
            if (owns) {
                const Four lengths = sum_of_blocks(squares + own_basis);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float length = divisor(Division::kSum, lengths.v[j]);
                    own[0].v[j] /= length, own[1].v[j] /= length;
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (owns) store_in_blocks(y.at(channel_of(half), own_basis), own[half]);
        }
        keep_own(own);
        cluster_sync();
    }

    if (kNmf && params.solve) {
        Scores scores;
        score(scores);
        __syncthreads();
        place_gram();
        T* const slopes = static_cast<T*>(params.slope) + image * p.rank * p.pixels + pixel;
        const int pixels_of_line = static_cast<int>(p.pixels);
        update(scores, [&](int n, int k, float c, float v, float d) {
            const float slope = c / (d + kEps);
            if (n < pixels && k < p.rank) slopes[k * pixels_of_line + n] = from_float<T>(slope);
            return slope * v;
        });
        // The Gram matrix took the place of a part of Y, which is needed once more.
        for (int i = threadIdx.x; i < min(padded, at.channels) * padded; i += kResidentThreads) {
            const int channel = i / padded, basis = i - channel * padded;
            const bool inside = channel < channels && basis < p.rank;
            *y.at(channel, basis) = from_float<T>(
                inside ? params.y[(image * p.channels + channel) * p.rank + basis] : 0);
        }
        __syncthreads();
    }
    store_z(params.z);
    if (!params.solve) return;

    float error = 0;
    const int lines = kTransposed ? pixels : channels, length = kTransposed ? channels : pixels;
#pragma unroll 1
    for (int n = 0; n < span; n += 16) {
        Accumulators<kType, kTransposed ? 16 : kMostChannels, kTransposed ? kMostChannels : 16,
                     kResidentWarps>
            features;
        if constexpr (kTransposed) {
            features.template add<true, true>(z.from(n, 0), y, padded, 16, at.channels);
        } else {
            features.template add<true, true>(y, z.from(n, 0), padded, at.channels, 16);
        }
        features.for_each_pair([&](int a, int b, float& v, float& w) {
            const int l = kTransposed ? a + n : a, e = kTransposed ? b : b + n;
            if (l >= lines || e >= length) return;
            const Pair<T> pair = read_pair(x.pair(l, e), 0, 0);
            const float first = to_float(pair.first) - v, second = to_float(pair.second) - w;
            error += first * first;
            if (e + 1 < length) error += second * second;
            write_pair(x.pair(l, e), 0, 0, v, w);
        });
    }
    __syncthreads();
    T* const out = static_cast<T*>(params.x_hat) + image * p.channels * p.pixels;
    store_swizzled<kResidentThreads>(x, out + pixel * (kTransposed ? p.channels : 1),
                                     kTransposed ? p.channels : p.pixels, lines, length);
    const double sum = block_sum<kResidentWarps>(error);
    if (threadIdx.x == 0) params.errors[blockIdx.x] = sum;
}

template <Type kType, bool kTransposed, Family kFamily>
__global__ void __launch_bounds__(kResidentThreads, 1)
    resident_kernel(const __grid_constant__ ResidentParams params) {
#ifdef MFOPS_CLUSTERS
    resident<kType, kTransposed, kFamily>(params);
#endif
}

}  // namespace mfops::cuda
