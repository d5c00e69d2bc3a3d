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
// fragment's lines come from different banks: (512, 1089, 64) takes 232,208 of the 232,448 bytes
// that a block has.
#pragma once

#include "cuda/factorize/cluster.cuh"

namespace mfops::cuda {

template <Type kType, bool kTransposed, Family kFamily>
__device__ __forceinline__ void persistent(const PersistentParams& params) {
    using T = Element<kType>;
    constexpr bool kNmf = kFamily == Family::kNmf;
    const FactorProblem& p = params.problem;
    const int channels = static_cast<int>(p.channels);
    const PersistentLayout at{padded_32(channels), padded_16(p.rank), params.span};
    const int padded = at.padded, span = at.span;
    const bool full = padded == kMaxPersistentRank;
    const int warp = threadIdx.x / 32;
    const int64_t image = blockIdx.x / kClusterBlocks;
    const unsigned rank = cluster_rank();
    // The image's 16s of columns, dealt out.
    const int tiles = static_cast<int>((p.pixels + 15) / 16);
    const int first_tile = tiles * static_cast<int>(rank) / kClusterBlocks;
    const int64_t pixel = static_cast<int64_t>(first_tile) * 16;
    const int count = (tiles * (static_cast<int>(rank) + 1) / kClusterBlocks - first_tile) * 16;
    const int pixels = within(p.pixels - pixel < 0 ? 0 : p.pixels - pixel, count);

    const auto floats = [](int byte) { return reinterpret_cast<float*>(shared_memory() + byte); };
    const auto place = [](int byte) { return byte / static_cast<int>(sizeof(T)); };
    const auto x = Swizzled<T>::of(place(at.x()), kTransposed ? at.channels : span);
    const auto y = Swizzled<T>::of(place(at.y()), padded);
    const auto z = Swizzled<T>::of(place(at.z()), padded);
    const auto gram = Swizzled<T>::of(place(at.y()), padded);  // in the place of Y
    float* const sums = floats(at.y());
    // Eights of bases exchanged within a line, so that the eight lines that a warp writes at a time
    // come from different banks.
    const int swizzle_shift = padded % 32 ? 1 : 0, swizzle_mask = padded % 32 ? 1 : 3;
    const auto sum_at = [&](int line, int basis) {
        return sums + line * padded + (basis ^ (line >> swizzle_shift & swizzle_mask) * 8);
    };
    float* const weights = floats(at.weights());
    float* const squares = floats(at.squares());
    float* const totals = floats(at.totals());
    const Ones<T> ones{reinterpret_cast<T*>(shared_memory()) + place(at.ones())};

    // This thread's own part of Y: four bases of a channel of each half. In float32 it rests in the
    // result's memory.
    const int fours = padded / 4;
    const auto own_part = [&] {
        const int thread = no_hoist(threadIdx.x);
        OwnPart part;
        part.row = thread / fours, part.basis = thread % fours * 4;
        part.row_of_half = static_cast<int>(rank) * at.owned() + part.row;
        part.any = part.row < at.owned() && part.row_of_half < at.half();
        return part;
    };
    // A row's sums over all blocks, to `totals`: each is fetched once, not by every thread.
    const auto sum_for_all = [&](const float* row) {
        if (threadIdx.x < fours) {
            store_four(totals + 4 * threadIdx.x, sum_of_blocks(row + 4 * threadIdx.x));
        }
        __syncthreads();
    };
    const auto channel_of = [&](const OwnPart& mine, int half) {
        return half * at.half() + mine.row_of_half;
    };
    // f(value in memory, value here) for each element of what this thread owns.
    const auto for_own = [&](const OwnPart& mine, Four(&own)[2], auto f) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int channel = channel_of(mine, half), basis = mine.basis + j;
                if (!mine.any || channel >= channels || basis >= p.rank) continue;
                f(params.y[(image * p.channels + channel) * p.rank + basis], own[half].v[j]);
            }
        }
    };
    const auto keep_own = [&](const OwnPart& mine, Four(&own)[2]) {
        for_own(mine, own, [](float& memory, float& value) { memory = value; });
    };
    const auto write_own = [&](const OwnPart& mine, const Four(&own)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (mine.any) store_in_blocks(y.at(channel_of(mine, half), mine.basis), own[half]);
        }
    };
    {
        const OwnPart mine = own_part();
        Four own[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int channel = channel_of(mine, half), basis = mine.basis + j;
                if (!mine.any || channel >= channels || basis >= p.rank) continue;
                own[half].v[j] = *origin_of<float>(params.start, image, channel, basis);
            }
        }
        if (kNmf) keep_own(mine, own);
        if (threadIdx.x < kGranule<T>) ones.granule[threadIdx.x] = from_float<T>(1);
        fill_swizzled<kClusterThreads>(
            x, p.x, origin_of<T>(p.x, image, kTransposed ? pixel : 0, kTransposed ? 0 : pixel),
            kTransposed ? span : at.channels, kTransposed ? at.channels : span,
            kTransposed ? pixels : channels, kTransposed ? channels : pixels,
            kTransposed ? 0 : pixel);
        cluster_sync();  // every block has begun
        write_own(mine, own);
        cluster_sync();
    }

    // The scores of a block's pixels. A warp has all bases of 16 pixels; what it then does with
    // them touches no other pixels.
    using Scores = Accumulators<kType, kMaxPersistentSpan, kMaxPersistentRank, kClusterWarps,
                                WarpGrid{kClusterWarps, 1}>;
    using Square = Accumulators<kType, kMaxPersistentRank, kMaxPersistentRank, kClusterWarps>;
    const bool has_pixels = 16 * warp < span;

    // The scores Y^T X.
    const auto score = [&](Scores& scores) {
        add_within<kTransposed, false>(scores, x, y, at.channels, full, kMaxPersistentSpan, padded);
    };
    const auto write_z = [&](int n, int k, float v, float w) {
        const uint32_t bits = n < pixels ? packed<T>(v, w) : 0;
        if (k < padded) store_shared(z.at(n, k), bits);
    };
    // Z as a softmax of the scores: a row of them lies in four lanes.
    const auto soften = [&](Scores& scores) {
        float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
        scores.for_each_pair([&](int n, int k, float& v, float& w) {
            v = k < p.rank ? v : -INFINITY;
            w = k + 1 < p.rank ? w : -INFINITY;
            float& own = n & 8 ? largest[1] : largest[0];
            own = fmaxf(own, fmaxf(v, w));
        });
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            largest[i] = fmaxf(largest[i], shuffle_xor(largest[i], 1));
            largest[i] = fmaxf(largest[i], shuffle_xor(largest[i], 2));
        }
        scores.for_each_pair([&](int n, int, float& v, float& w) {
            const float own = n & 8 ? largest[1] : largest[0];
            v = expf(v - own), w = expf(w - own);
            (n & 8 ? sum[1] : sum[0]) += v + w;
        });
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            sum[i] += shuffle_xor(sum[i], 1);
            sum[i] += shuffle_xor(sum[i], 2);
        }
        const float part[2] = {quotient(1, sum[0]), quotient(1, sum[1])};
        scores.for_each_pair([&](int n, int k, float& v, float& w) {
            const float factor = n & 8 ? part[1] : part[0];
            write_z(n, k, factor * v, factor * w);
        });
    };
    // Y^T Y in the place of Y.
    const auto place_gram = [&] {
        Square product;
        add_within<false, false>(product, y, y, at.channels, full, padded, padded);
        __syncthreads();
        product.for_each_pair([&](int l, int k, float& v, float& w) {
            if (l < padded && k < padded) write_pair(gram.pair(l, k), 0, 0, v, w);
        });
        __syncthreads();
    };
    // Z's next values, z times score / denominator, which visit(pixel, basis, denominator)
    // sees before z changes.
    const auto update = [&](Scores& scores, auto visit) {
        scores.for_each_pair([&](int n, int k, float& v, float& w) {
            uint32_t bits;  // any, where there are no such bases: a branch would cost more
            load_shared(bits, z.at(n, k < padded ? k : 0));
            v *= to_float(T{static_cast<uint16_t>(bits)});
            w *= to_float(T{static_cast<uint16_t>(bits >> 16)});
        });
        // Half of the bases at a time: with all of them registers would not do.
        constexpr int kPart = kMaxPersistentRank / 2;
#pragma unroll
        for (int part = 0; part < kMaxPersistentRank; part += kPart) {
            Accumulators<kType, kMaxPersistentSpan, kPart, kClusterWarps,
                         WarpGrid{kClusterWarps, 1}>
                products;
            add_within<true, false>(products, z, gram.from(0, part), padded, full,
                                    kMaxPersistentSpan, padded - part);
            float denominator[kPart / 2];
            int i = 0;
            products.for_each_pair([&](int, int, float& d, float& e) {
                denominator[i++] = d + kEps, denominator[i++] = e + kEps;
            });
            i = 0;
            scores.for_each_pair([&](int n, int k, float& v, float& w) {
                if (k / kPart * kPart != part) return;
                visit(n, k, denominator[i]), visit(n, k + 1, denominator[i + 1]);
                v = quotient(v, denominator[i++]), w = quotient(w, denominator[i++]);
            });
        }
        sync_warp();  // all lanes have read the Z that they multiplied
        scores.for_each_pair(write_z);
    };
    const auto store_z = [&](void* to) {
        T* const out = static_cast<T*>(to) + image * p.rank * p.pixels + pixel;
#pragma unroll 4
        for (int i = threadIdx.x; i < p.rank * pixels; i += kClusterThreads) {
            const int basis = i / pixels, n = i - basis * pixels;
            out[basis * p.pixels + n] = *z.at(n, basis);
        }
    };

    if (kNmf && has_pixels) {  // where Z starts
        Scores scores;
        score(scores);
        soften(scores);
    }
#pragma unroll 1
    for (int step = 0; step < params.steps; ++step) {
        {
            Scores scores;
            if (has_pixels) score(scores);
            if constexpr (kNmf) {
                place_gram();
                if (has_pixels) update(scores, [](int, int, float) {});
            } else {
                if (has_pixels) soften(scores);
            }
        }
        __syncthreads();
        if (!kNmf && threadIdx.x < 4 * 32) {  // Z's row sums
            Accumulators<kType, 16, kMaxPersistentRank, 4, WarpGrid{1, 4}> weight;
            weight.template add<true, false>(ones, z, span, 16, padded);
            weight.for_each_pair([&](int line, int k, float& v, float& w) {
                if (line == 0 && k < padded) *reinterpret_cast<Two*>(weights + k) = {v, w};
            });
        }

        const OwnPart mine = own_part();
        Four total[2];
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            const int first = half * at.half();
            Accumulators<kType, kMaxPersistentChannels / 2, kMaxPersistentRank, kClusterWarps,
                         WarpGrid{kClusterWarps, 1}>
                sum;
            if (16 * warp < at.half()) {
                add_within<!kTransposed, false>(
                    sum, x.from(kTransposed ? 0 : first, kTransposed ? first : 0), z, span, full,
                    kMaxPersistentSpan, padded);
            }
            sum.for_each_pair([&](int c, int k, float& v, float& w) {
                if (c >= at.half() || k >= padded) return;
                *reinterpret_cast<Two*>(sum_at(c, k)) = {v, w};
            });
            cluster_sync();
            if (mine.any) {
                const Four all = sum_of_blocks(sum_at(mine.row_of_half, mine.basis));
                if (half == 0) {
                    total[0] = all;
                } else {
                    total[1] = all;
                }
            }
            cluster_sync();
        }

        Four own[2] = {};
        if constexpr (kNmf) {
            Square gram_partial;
            add_within<false, false>(gram_partial, z, z, span, full, padded, padded);
            gram_partial.for_each_pair([&](int l, int k, float& v, float& w) {
                if (l >= padded || k >= padded) return;
                *reinterpret_cast<Two*>(sum_at(l, k)) = {v, w};
            });
            cluster_sync();
            // Each block adds up an eighth of Z Z^T, whose places no other one reads, for all
            // blocks.
            const int eighth = padded * fours / kClusterBlocks;
            if (threadIdx.x < eighth) {
                float* const four = sums + 4 * (rank * eighth + threadIdx.x);
                store_in_blocks(four, sum_of_blocks(four));
            }
            cluster_sync();
            for_own(mine, own, [](float& memory, float& value) { value = memory; });
            float* const rows = sums + padded * padded;
            const auto row_at = [&](int half) { return rows + (2 * mine.row + half) * padded; };
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (mine.any) store_four(row_at(half) + mine.basis, own[half]);
            }
            __syncthreads();
            if (mine.any) {
                Four denominator[2] = {};
#pragma unroll 1
                for (int l = 0; l < padded; l += 4) {
                    const Four left[2] = {load_four(row_at(0) + l), load_four(row_at(1) + l)};
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const Four right = load_four(sum_at(l + i, mine.basis));
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            denominator[0].v[j] += left[0].v[i] * right.v[j];
                            denominator[1].v[j] += left[1].v[i] * right.v[j];
                        }
                    }
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        own[half].v[j] = quotient(own[half].v[j] * total[half].v[j],
                                                  denominator[half].v[j] + kEps);
                    }
                }
            }
            cluster_sync();  // what lies in the place of Y is done with, in every block
        } else {
            sum_for_all(weights);
            if (mine.any) {
                const Four weight = load_four(totals + mine.basis);
                Four square;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float factor = quotient(1, kEps + weight.v[j]);
                    own[0].v[j] = total[0].v[j] * factor;
                    own[1].v[j] = total[1].v[j] * factor;
                    square.v[j] = own[0].v[j] * own[0].v[j] + own[1].v[j] * own[1].v[j];
                }
                store_four(sums + mine.row * padded + mine.basis, square);
            }
            __syncthreads();
            if (threadIdx.x < padded) {
                const int left = at.half() - static_cast<int>(rank) * at.owned();
                float sum = 0;
#pragma unroll 8
                for (int row = 0; row < min(left, at.owned()); ++row) {
                    sum += sums[row * padded + threadIdx.x];
                }
                squares[threadIdx.x] = sum;
            }
            cluster_sync();
            sum_for_all(squares);
            if (mine.any) {
                const Four lengths = load_four(totals + mine.basis);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float factor = quotient(1, divisor(Division::kSum, lengths.v[j]));
                    own[0].v[j] *= factor, own[1].v[j] *= factor;
                }
            }
        }
        write_own(mine, own);
        if (kNmf || step + 1 == params.steps) keep_own(mine, own);
        cluster_sync();
    }

    if (kNmf && params.reconstruct) {
        Scores scores;
        if (has_pixels) score(scores);
        place_gram();
        T* const z_scales = static_cast<T*>(params.z_scale) + image * p.rank * p.pixels + pixel;
        const int pixels_of_line = static_cast<int>(p.pixels);
        if (has_pixels) {
            update(scores, [&](int n, int k, float denominator) {
                if (n >= pixels || k >= p.rank) return;
                z_scales[k * pixels_of_line + n] =
                    from_float<T>(quotient(to_float(*z.at(n, k)), denominator));
            });
        }
        __syncthreads();
        // The Gram matrix took the place of a part of Y, which is needed once more.
        for (int i = threadIdx.x; i < min(padded, at.channels) * padded; i += kClusterThreads) {
            const int channel = i / padded, basis = i - channel * padded;
            const bool inside = channel < channels && basis < p.rank;
            *y.at(channel, basis) = from_float<T>(
                inside ? params.y[(image * p.channels + channel) * p.rank + basis] : 0);
        }
        __syncthreads();
    }
    store_z(params.z);
    if (!params.reconstruct) return;

    // X' in the place of X, 16 pixels at a time. A warp has 32 channels; beyond the valid lines and
    // elements X and X' are zeros.
    float error = 0;
    if (32 * warp < at.channels) {
        static_assert(kMaxPersistentChannels == 32 * kClusterWarps);
#pragma unroll 1
        for (int n = 0; n < span; n += 16) {
            Accumulators<kType, kTransposed ? 16 : kMaxPersistentChannels,
                         kTransposed ? kMaxPersistentChannels : 16, kClusterWarps>
                features;
            if constexpr (kTransposed) {
                features.template add<true, true>(z.from(n, 0), y, padded);
            } else {
                features.template add<true, true>(y, z.from(n, 0), padded);
            }
            features.for_each_pair([&](int a, int b, float& v, float& w) {
                const auto place = x.pair(kTransposed ? a + n : a, kTransposed ? b : b + n);
                const Pair<T> pair = read_pair(place, 0, 0);
                const float first = to_float(pair.first) - v, second = to_float(pair.second) - w;
                error += first * first + second * second;
                write_pair(place, 0, 0, v, w);
            });
        }
    }
    __syncthreads();
    const int lines = kTransposed ? pixels : channels, length = kTransposed ? channels : pixels;
    T* const out = static_cast<T*>(params.x_hat) + image * p.channels * p.pixels;
    store_swizzled<kClusterThreads>(x, out + pixel * (kTransposed ? p.channels : 1),
                                    kTransposed ? p.channels : p.pixels, lines, length);
    const double sum = block_sum<kClusterWarps>(error);
    if (threadIdx.x == 0) params.errors[blockIdx.x] = sum;
}

template <Type kType, bool kTransposed, Family kFamily>
__global__ void __launch_bounds__(kClusterThreads, 1)
    persistent_kernel(const __grid_constant__ PersistentParams params) {
#ifdef MFOPS_CLUSTERS
    persistent<kType, kTransposed, kFamily>(params);
#endif
}

}  // namespace mfops::cuda
