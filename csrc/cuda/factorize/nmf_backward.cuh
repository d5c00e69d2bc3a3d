// The gradient of X through nmf's last update, in one pass over X and G'. With E = s (X - Y Z),
// s = 2 g / elements, and D = G' - E it is E + Y (W * (Y^T D)).
//
// A block owns up to `own` channels of an image and goes through a range of its tiles. Every chunk
// of a tile's channels gives D and its part of Y^T D; the own chunk, the last, keeps E in registers
// until Y (W * ..) is added to it. With more channels than one block owns the groups' blocks run
// side by side and find each other's chunks in the L2.
#pragma once

#include "cuda/factorize/methods.cuh"

namespace mfops::cuda {

struct NmfBackwardParams {
    FactorProblem problem;
    ColumnWork work;
    int stages;
    bool whole;
    const void* bases;  // (B, C, padded)
    Lines z, z_scale;   // lines are bases
    Lines grad_x_hat;   // data null: none
    const float* grad_mse;
    double two_over_elements;
    void* grad_x;
};

template <Type kType, bool kTransposed, int kOwn, int kPixels>
struct NmfBackwardLayout {
    using T = Element<kType>;
    using X = ChunkTile<T, kTransposed, kOwn, kPixels>;

    int padded, stages, channels;
    bool whole, two;  // two: X and G', not one of them

    __host__ __device__ constexpr int pitch() const { return base_pitch<T>(padded); }
    // Z as it comes, lines are bases; afterwards W * (Y^T D), lines are pixels.
    __host__ __device__ constexpr int coefficients() const {
        const int before = padded * (kPixels + kGranule<T>), after = kPixels * pitch();
        return before > after ? before : after;
    }
    __host__ __device__ constexpr int bases() const { return 0; }
    __host__ __device__ constexpr int stage(int slot) const {
        return (whole ? padded_16(channels) * pitch() : 0) +
               slot * ((two ? 2 : 1) * X::kElements + (whole ? 0 : kOwn * pitch()));
    }
    __host__ __device__ constexpr int grad(int slot) const {
        return stage(slot) + (two ? X::kElements : 0);
    }
    __host__ __device__ constexpr int streamed(int slot) const { return grad(slot) + X::kElements; }
    __host__ __device__ constexpr int z(int slot) const {
        return stage(stages) + slot * coefficients();
    }
    __host__ __device__ constexpr int elements() const { return z(stages); }
};

// One step of a block: a chunk of channels of a tile.
struct NmfBackwardStep {
    int tile;
    int64_t pixel;
    int channel, channels;
    bool first, last;  // of the tile's chunks
};

template <Type kType, bool kTransposed, int kOwn, int kRank, int kPixels>
__global__ void __launch_bounds__(kThreads, 1)
    nmf_backward_kernel(const __grid_constant__ NmfBackwardParams params) {
    using At = NmfBackwardLayout<kType, kTransposed, kOwn, kPixels>;
    using T = typename At::T;
    using X = typename At::X;
    // Coefficients: lines are bases, as channels are of features that are not transposed.
    using Z = ChunkTile<T, false, kRank, kPixels>;
    const FactorProblem& p = params.problem;
    const ColumnWork& work = params.work;
    const bool has_grad = params.grad_x_hat.data != nullptr, has_error = params.grad_mse != nullptr;
    const int padded = padded_16(p.rank);
    const At at{padded, params.stages, static_cast<int>(p.channels), params.whole,
                has_grad && has_error};
    const ColumnItem item = item_of(work, p.batch, work.groups, blockIdx.x);
    const T* const bases = static_cast<const T*>(params.bases) + item.image * p.channels * padded;

    const float s =
        has_error ? static_cast<float>(*params.grad_mse * params.two_over_elements) : 0.0f;
    // Without G' the factor s is applied at the end, so that D does not vanish in float16.
    const float inner = has_grad ? s : 1.0f, outer = has_grad ? 1.0f : s;

    const auto step_of = [&](int step) {
        const int tile = step / work.chunks, i = step - tile * work.chunks;
        const int channel = (item.group + 1 + i) % work.chunks * kOwn;
        return NmfBackwardStep{.tile = tile,
                               .pixel = static_cast<int64_t>(item.first_tile + tile) * kPixels,
                               .channel = channel,
                               .channels = within(p.channels - channel, kOwn),
                               .first = i == 0,
                               .last = i == work.chunks - 1};
    };
    const auto bases_tile = [&](int slot, const NmfBackwardStep& c) {
        return Tile<T>{params.whole ? at.bases() + c.channel * at.pitch() : at.streamed(slot),
                       at.pitch()};
    };

    const auto load = [&](int step, int slot) {
        const NmfBackwardStep c = step_of(step);
        const int z_slot = c.tile % params.stages;
        if (has_error) {
            X::load(at.stage(slot), p.x, item.image, c.channel, c.channels, c.pixel, p.pixels);
        }
        if (has_grad) {
            X::load(at.grad(slot), params.grad_x_hat, item.image, c.channel, c.channels, c.pixel,
                    p.pixels);
        }
        if (!params.whole || step < work.chunks) {
            load_dense(bases_tile(slot, c), bases + static_cast<int64_t>(c.channel) * padded,
                       padded_16(c.channels), padded, c.channels);
        }
        if (!c.first) return;
        Z::load(at.z(z_slot), params.z, item.image, 0, p.rank, c.pixel, p.pixels);
    };

    constexpr int kLines = kTransposed ? kPixels : kOwn, kLength = kTransposed ? kOwn : kPixels;
    Accumulators<kType, kLines, kLength, kWarps> features;
    Accumulators<kType, kPixels, kRank, kWarps> scores, z_scale;

    const auto compute = [&](int step, int slot) {
        const NmfBackwardStep c = step_of(step);
        const int z_slot = c.tile % params.stages;
        const int pixels = within(p.pixels - c.pixel, kPixels), channels = padded_16(c.channels);
        const int lines = kTransposed ? kPixels : channels;
        const int length = kTransposed ? channels : kPixels;
        bool moved = false;
        if (has_error) {
            moved |=
                X::align_lines(at.stage(slot), p.x, item.image, c.channel, c.channels, c.pixel);
        }
        if (has_grad) {
            moved |= X::align_lines(at.grad(slot), params.grad_x_hat, item.image, c.channel,
                                    c.channels, c.pixel);
        }
        if (c.first) {
            moved |= Z::align_lines(at.z(z_slot), params.z, item.image, 0, p.rank, c.pixel);
            scores.zero();
        }
        if (moved) __syncthreads();

        const auto x = X::tile(at.stage(slot)), d = X::tile(at.grad(slot));
        const auto z = Z::tile(at.z(z_slot));
        const auto y = bases_tile(slot, c);
        if (c.last) {  // on its way while the products are computed
            const T* const from = origin_of<T>(params.z_scale, item.image, 0, c.pixel);
            z_scale.for_each_pair([&](int n, int k, float& v, float& w) {
                const T* const at = from + k * params.z_scale.line + n * params.z_scale.step;
                v = n < pixels && k < p.rank ? to_float(*at) : 0;
                w = n < pixels && k + 1 < p.rank ? to_float(at[params.z_scale.line]) : 0;
            });
        }
        features.zero();
        if (has_error) {
            if constexpr (kTransposed) {
                features.template add<false, true>(z, y, padded, lines, length);
            } else {
                features.template add<true, false>(y, z, padded, lines, length);
            }
        }
        // E into the accumulators, D in the place of G' (or of X): only this thread reads there.
        const int line_end = kTransposed ? pixels : c.channels;
        const int end = kTransposed ? c.channels : pixels;
        features.for_each_pair([&](int l, int e, float& v, float& w) {
            if (l >= lines || e >= length) return;
            if (has_error) {
                const Pair<T> pair = read_pair(x, l, e);
                v = l < line_end && e < end ? inner * (to_float(pair.first) - v) : 0;
                w = l < line_end && e + 1 < end ? inner * (to_float(pair.second) - w) : 0;
            }
            Pair<T> pair{};
            if (has_grad) pair = read_pair(d, l, e);
            write_pair(d, l, e, to_float(pair.first) - v, to_float(pair.second) - w);
        });
        __syncthreads();
        scores.template add<kTransposed, false>(d, y, channels, kPixels, padded);
        if (!c.last) return;

        const Tile<T> weighted{at.z(z_slot), at.pitch()};
        scores.for_each_pair_with(z_scale, [&](int n, int k, float& v, float& w, float a, float b) {
            if (k < padded)
                write_pair(weighted, n, k, n < pixels ? v * a : 0, n < pixels ? w * b : 0);
        });
        __syncthreads();
        if constexpr (kTransposed) {
            features.template add<true, true>(weighted, y, padded, lines, length);
        } else {
            features.template add<true, true>(y, weighted, padded, lines, length);
        }
        features.for_each_pair([&](int l, int e, float& v, float& w) {
            if (l < lines && e < length) write_pair(d, l, e, outer * v, outer * w);
        });
        __syncthreads();
        X::store(at.grad(slot), params.grad_x, p, item.image, c.channel, c.channels, c.pixel);
    };
    pipeline(item.tiles * work.chunks, params.stages, load, compute);
}

}  // namespace mfops::cuda
