// X' = A B and the sum of (X - X')^2, X read once and X' written once.
#pragma once

#include "cuda/reconstruct/strip.cuh"

namespace mfops::cuda {

struct ForwardParams {
    Problem problem;
    Work work;
    int stages;
    void* x_hat;     // null: not wanted
    double* errors;  // one for each block
};

template <class Tiles>
__host__ __device__ constexpr int forward_stage_elements(int rank) {
    return Tiles::X::kElements + Tiles::B::elements(padded_16(rank));
}

template <class Tiles>
constexpr size_t forward_shared_bytes(int rank, int stages) {
    return sizeof(typename Tiles::T) *
           (Tiles::A::elements(padded_16(rank)) + stages * forward_stage_elements<Tiles>(rank));
}

// kShared: one product for all images.
template <Type kType, bool kTransposed, bool kShared, int kRows, int kCols, int kWarps, int kBlocks>
__global__ void __launch_bounds__(32 * kWarps, kBlocks)
    forward_kernel(const __grid_constant__ ForwardParams params) {
    using F = Tiles<kType, kTransposed, kRows, kCols, kWarps>;
    using T = typename F::T;
    const Problem& p = params.problem;
    const int padded = padded_16(p.rank);
    const Item item = item_of(params.work, p.batch, blockIdx.x);
    const int64_t row = static_cast<int64_t>(item.strip) * kRows;

    // Layout in shared memory: the owned part of A, then the stages: X and the streamed part of B.
    const int own = 0, stages = F::A::elements(padded);
    const auto stage = [&](int slot) { return stages + slot * forward_stage_elements<F>(p.rank); };
    const auto col_of = [](const Step& at) { return static_cast<int64_t>(at.tile) * kCols; };
    const auto x_origin = [&](const Step& at) {
        return origin_of<T>(p.x, at.image, row, col_of(at));
    };
    const auto b_start = [&](const Step& at) { return stage(at.streamed) + F::X::kElements; };

    Steps<kShared> loads{item, params.stages}, steps{item, params.stages};
    const auto load = [&](int step, int slot) {
        const Step at = loads.next(slot);
        const int64_t col = col_of(at);
        if (step == 0) F::A::load(own, p.rank, p.a, at.image, row, p.rows - row);
        if (at.first) F::B::load(b_start(at), p.rank, p.b, at.image, col, p.cols - col);
        F::X::load(stage(slot), p.x, x_origin(at), p.rows - row, p.cols - col);
    };

    Accumulators<kType, kRows, kCols, kWarps> product;
    const auto a = F::A::tile(own, padded);
    double error = 0;
    const auto compute = [&](int step, int slot) {
        const Step at = steps.next(slot);
        const int64_t col = col_of(at);
        bool moved = F::X::align_lines(stage(slot), p.x, x_origin(at));
        if (step == 0) moved |= F::A::align_lines(own, p.rank, p.a, at.image, row);
        if (at.first) moved |= F::B::align_lines(b_start(at), p.rank, p.b, at.image, col);
        if (moved) __syncthreads();
        if (at.first) {
            product.zero();
            product.template add<!kTransposed, kTransposed>(a, F::B::tile(b_start(at), padded),
                                                            padded);
        }
        const auto x = F::X::tile(stage(slot));
        const bool write = params.x_hat != nullptr && (!kShared || at.image == 0);
        const int row_end = within(p.rows - row, kRows), col_end = within(p.cols - col, kCols);
        float squares = 0;
        // X' goes to X's place: only this thread reads it.
        if (row_end == kRows && col_end == kCols) {
            product.for_each_pair([&](int r, int c, float& v, float& w) {
                const Pair<T> pair = read_pair(x, r, c);
                const float e = to_float(pair.first) - v, f = to_float(pair.second) - w;
                squares += e * e + f * f;
                if (write) write_pair(x, r, c, v, w);
            });
        } else {  // the edges are asked for
            product.for_each_pair([&](int r, int c, float& v, float& w) {
                const Pair<T> pair = read_pair(x, r, c);
                const float e = to_float(pair.first) - v, f = to_float(pair.second) - w;
                if (r < row_end && c < col_end) squares += e * e;
                if (r < row_end && c + 1 < col_end) squares += f * f;
                if (write) write_pair(x, r, c, v, w);
            });
        }
        error += squares;
        if (!write) return;
        __syncthreads();
        T* const to = static_cast<T*>(params.x_hat) +
                      ((kShared ? 0 : at.image) * p.rows + row) * p.cols + col;
        write_back<32 * kWarps>(x, to, p.cols, kRows, kCols, p.rows - row, p.cols - col);
    };

    pipeline(item.steps(), params.stages, load, compute);
    error = block_sum<kWarps>(error);
    if (threadIdx.x == 0) params.errors[blockIdx.x] = error;
}

}  // namespace mfops::cuda
