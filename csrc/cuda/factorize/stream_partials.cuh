// The second of a round's two kernels where all channels and bases are too many for one block: from
// the Z that stream_round.cuh left in memory and X partial sums of X Z^T, and of Z's row sums (em,
// vq, cd) or of Z Z^T (nmf).
#pragma once

#include "cuda/factorize/methods.cuh"

namespace mfops::cuda {

struct PartialsParams {
    FactorProblem problem;
    ColumnWork work;  // groups: for each chunk of the channels, then for Z Z^T, all sets of bases
    int stages;
    int set;          // bases of a block, whole 16s
    const void* z;    // (B, N, padded)
    float* partials;  // (B, ranges, C, padded)
    float* sums;      // (B, ranges, padded); null: not wanted
    float* squares;   // (B, ranges, padded, padded), Z Z^T; null: not wanted
};

// Sets of bases, as even as whole 16s allow.
constexpr int set_of(int padded, int rank) {
    const int sets = (padded + rank - 1) / rank;
    return padded_16((padded + sets - 1) / sets);
}
__host__ __device__ constexpr int sets_of(int padded, int set) { return (padded + set - 1) / set; }

// Layout in shared memory, in elements from its beginning.
template <Type kType, bool kTransposed, bool kWideZ, int kOwn, int kPixels>
struct PartialsLayout {
    using T = Element<kType>;
    using X = ChunkTile<T, kTransposed, kOwn, kPixels>;
    using Z = Coefficient<kType, kWideZ>;
    static constexpr int kPerZ = sizeof(Z) / sizeof(T);
    static_assert(kWideZ || kPixels * base_pitch<T>(kMaxRank) <= X::kElements);

    int set, stages;

    __host__ __device__ constexpr int pitch() const { return base_pitch<Z>(set); }
    // X or, for Z Z^T, all bases of Z.
    __host__ __device__ constexpr int stage(int slot) const {
        return slot * (X::kElements + kPixels * pitch() * kPerZ);
    }
    __host__ __device__ constexpr int z(int slot) const { return stage(slot) + X::kElements; }
    __host__ __device__ constexpr int elements() const { return stage(stages); }
};

template <Type kType, bool kTransposed, bool kWideZ, int kOwn, int kRank, int kPixels>
__global__ void __launch_bounds__(kThreads, 1)
    partials_kernel(const __grid_constant__ PartialsParams params) {
    using At = PartialsLayout<kType, kTransposed, kWideZ, kOwn, kPixels>;
    using X = typename At::X;
    using Z = typename At::Z;
    const FactorProblem& p = params.problem;
    const int padded = padded_16(p.rank), sets = sets_of(padded, params.set);
    const At at{params.set, params.stages};
    const ColumnItem item = item_of(params.work, p.batch, sets, blockIdx.x);
    const int basis = item.group % sets * params.set, bases = min(padded - basis, params.set);
    const int chunk = item.group / sets, channel = chunk * kOwn;
    const bool squares = !kWideZ && chunk == params.work.chunks;
    const int rows = squares ? padded : within(p.channels - channel, kOwn);
    const Z* const z_of_image = static_cast<const Z*>(params.z) + item.image * p.pixels * padded;

    const auto pixel_of = [&](int step) {
        return static_cast<int64_t>(item.first_tile + step) * kPixels;
    };
    const auto z_tile = [&](int slot) { return Tile<Z>{at.z(slot) / At::kPerZ, at.pitch()}; };
    const auto all_bases = [&](int slot) {
        return Tile<Z>{at.stage(slot) / At::kPerZ, base_pitch<Z>(padded)};
    };

    const auto load = [&](int step, int slot) {
        const int64_t pixel = pixel_of(step);
        const int pixels = within(p.pixels - pixel, kPixels);
        const Z* const z = z_of_image + pixel * padded;
        load_dense(z_tile(slot), z + basis, kPixels, bases, pixels, padded - bases);
        if (squares) {
            load_dense(all_bases(slot), z, kPixels, padded, pixels);
        } else {
            X::load(at.stage(slot), p.x, item.image, channel, rows, pixel, p.pixels);
        }
    };

    Accumulators<kProductType<kType, kWideZ>, kOwn, kRank, kWarps> sum;
    const bool sums = params.sums && chunk == 0 && threadIdx.x < bases;
    float row_sum = 0;
    const auto compute = [&](int step, int slot) {
        const int64_t pixel = pixel_of(step);
        const auto z = z_tile(slot);
        if (squares) {
            sum.template add<false, false>(all_bases(slot), z, kPixels, padded, bases);
            return;
        }
        const int x_start = at.stage(slot);
        if (X::align_lines(x_start, p.x, item.image, channel, rows, pixel)) __syncthreads();
        sum.template add<!kTransposed, false>(X::tile(x_start), z, kPixels, padded_16(rows), bases);
        if (sums) {
            const int pixels = within(p.pixels - pixel, kPixels);
#pragma unroll 4
            for (int n = 0; n < pixels; ++n) row_sum += to_float(*z.at(n, threadIdx.x));
        }
    };

    pipeline(item.tiles, params.stages, load, compute);
    const int64_t index = item.image * params.work.ranges + item.range;
    float* const to = squares ? params.squares + index * padded * padded
                              : params.partials + (index * p.channels + channel) * padded;
    sum.for_each_pair([&](int row, int k, float& v, float& w) {
        if (row >= rows || k >= bases) return;
        *reinterpret_cast<Two*>(to + row * padded + basis + k) = {v, w};
    });
    if (sums) params.sums[index * padded + basis + threadIdx.x] = row_sum;
}

}  // namespace mfops::cuda
