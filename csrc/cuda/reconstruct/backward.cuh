// Gradients of X, A and B. With D = G' - s (X - X'), s = 2 g / elements, summed over the images
// that share a product:
//
//     dX = s (X - X'),    dA = D B^T,    dB = A^T D
//
// Blocks that own rows sum dA over the columns, blocks that own columns sum dB over the rows, both
// in registers, so each kind reads X and G' once and computes X' anew. All run in one launch and go
// through the matrix from its beginning at the same pace: what one kind has read, the other finds
// in the L2. Neither D nor X - X' is ever written to global memory.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/reconstruct/strip.cuh"

namespace mfops::cuda {

// Where the blocks of one kind put their factor's gradient: in the factor's type or, where several
// blocks share a strip, as float32 partial sums, one for each block. Both null: not wanted.
struct FactorGradient {
    void* result = nullptr;
    float* partials = nullptr;

    __device__ __forceinline__ bool wanted() const { return result || partials; }
};

struct BackwardParams {
    Problem problem;
    Lines grad_x_hat;
    bool grad_x_hat_per_image;
    const float* grad_mse;
    double two_over_elements;
    int stages;
    Work row_work, col_work;
    bool cols_first;                        // whether the first blocks own columns, and
    unsigned first_blocks;                  // how many those are
    void *grad_x_by_rows, *grad_x_by_cols;  // null: that kind does not write dX
    FactorGradient grad_a, grad_b;
};

template <class Tiles, bool kOwnRows>
__host__ __device__ constexpr int own_elements(int rank) {
    return (kOwnRows ? Tiles::A::elements(padded_16(rank)) : Tiles::B::elements(padded_16(rank)));
}
template <class Tiles, bool kOwnRows>
__host__ __device__ constexpr int streamed_elements(int rank) {
    return own_elements<Tiles, !kOwnRows>(rank);
}
template <class Tiles, bool kOwnRows>
__host__ __device__ constexpr int backward_stage_elements(int rank, bool grad_x_hat) {
    return (grad_x_hat ? 2 : 1) * Tiles::X::kElements + streamed_elements<Tiles, kOwnRows>(rank);
}
// The owned factor, D, and the stages: X, G' and the streamed factor.
template <class Tiles, bool kOwnRows>
constexpr size_t strip_shared_bytes(int rank, bool grad_x_hat, int stages) {
    return sizeof(typename Tiles::T) *
           (own_elements<Tiles, kOwnRows>(rank) + Tiles::X::kElements +
            stages * backward_stage_elements<Tiles, kOwnRows>(rank, grad_x_hat));
}
template <Type kType, bool kTransposed, int kOwn, int kStream, int kWarps>
constexpr size_t backward_shared_bytes(int rank, bool grad_x_hat, int stages) {
    using Rows = Tiles<kType, kTransposed, kOwn, kStream, kWarps>;
    using Cols = Tiles<kType, kTransposed, kStream, kOwn, kWarps>;
    return std::max(strip_shared_bytes<Rows, true>(rank, grad_x_hat, stages),
                    strip_shared_bytes<Cols, false>(rank, grad_x_hat, stages));
}

// The work of a block that owns rows, or columns.
template <Type kType, bool kTransposed, bool kShared, bool kOwnRows, int kOwn, int kStream,
          int kRank, int kWarps>
__device__ __forceinline__ void backward_strip(const BackwardParams& params, const Work& work,
                                               unsigned index, void* grad_x,
                                               const FactorGradient& grad_factor) {
    constexpr int kRows = kOwnRows ? kOwn : kStream, kCols = kOwnRows ? kStream : kOwn;
    using F = Tiles<kType, kTransposed, kRows, kCols, kWarps>;
    using T = typename F::T;
    const Problem& p = params.problem;
    const int padded = padded_16(p.rank), stages = params.stages;
    const bool has_grad = params.grad_x_hat.data != nullptr;
    const bool has_error = params.grad_mse != nullptr;
    const Item item = item_of(work, p.batch, index);
    const int64_t own = static_cast<int64_t>(item.strip) * kOwn;
    if (own >= (kOwnRows ? p.rows : p.cols)) return;

    const float s =
        has_error ? static_cast<float>(*params.grad_mse * params.two_over_elements) : 0.0f;
    // Without G' the factor s is applied to the sums, so that D does not vanish in float16.
    const float inner = has_grad ? s : 1.0f, outer = has_grad ? 1.0f : s;

    // Layout in shared memory.
    const int owned = 0, d_start = own_elements<F, kOwnRows>(p.rank);
    const auto stage = [&](int slot) {
        return d_start + F::X::kElements +
               slot * backward_stage_elements<F, kOwnRows>(p.rank, has_grad);
    };
    const auto row_of = [&](const Step& at) {
        return kOwnRows ? own : static_cast<int64_t>(at.tile) * kRows;
    };
    const auto col_of = [&](const Step& at) {
        return kOwnRows ? static_cast<int64_t>(at.tile) * kCols : own;
    };
    const auto feature_origin = [&](const Lines& from, const Step& at) {
        return origin_of<T>(from, at.image, row_of(at), col_of(at));
    };
    const auto grad_start = [&](int slot) { return stage(slot) + F::X::kElements; };
    const auto streamed = [&](const Step& at) {
        return stage(at.streamed) + (has_grad ? 2 : 1) * F::X::kElements;
    };
    const auto a_start = [&](const Step& at) { return kOwnRows ? owned : streamed(at); };
    const auto b_start = [&](const Step& at) { return kOwnRows ? streamed(at) : owned; };
    // G' of shared factors that comes summed is counted with the first image.
    const auto uses_grad = [&](const Step& at) {
        return has_grad && (params.grad_x_hat_per_image || at.image == 0);
    };
    // Which factors' tiles come with a step.
    const auto brings_a = [](int step, const Step& at) { return kOwnRows ? step == 0 : at.first; };
    const auto brings_b = [](int step, const Step& at) { return kOwnRows ? at.first : step == 0; };

    Steps<kShared> loads{item, stages}, steps{item, stages};
    const auto load = [&](int step, int slot) {
        const Step at = loads.next(slot);
        const int64_t row = row_of(at), col = col_of(at);
        if (brings_a(step, at)) {
            F::A::load(a_start(at), p.rank, p.a, at.image, row, p.rows - row);
        }
        if (brings_b(step, at)) {
            F::B::load(b_start(at), p.rank, p.b, at.image, col, p.cols - col);
        }
        if (has_error) {
            F::X::load(stage(slot), p.x, feature_origin(p.x, at), p.rows - row, p.cols - col);
        }
        if (uses_grad(at)) {
            F::X::load(grad_start(slot), params.grad_x_hat, feature_origin(params.grad_x_hat, at),
                       p.rows - row, p.cols - col);
        }
    };
    // What `load` brought, settled: whether anything was moved.
    const auto align_lines = [&](int step, const Step& at) {
        bool moved = false;
        if (brings_a(step, at)) {
            moved |= F::A::align_lines(a_start(at), p.rank, p.a, at.image, row_of(at));
        }
        if (brings_b(step, at)) {
            moved |= F::B::align_lines(b_start(at), p.rank, p.b, at.image, col_of(at));
        }
        if (has_error) moved |= F::X::align_lines(stage(at.slot), p.x, feature_origin(p.x, at));
        if (uses_grad(at)) {
            moved |= F::X::align_lines(grad_start(at.slot), params.grad_x_hat,
                                       feature_origin(params.grad_x_hat, at));
        }
        return moved;
    };

    Accumulators<kType, kRows, kCols, kWarps> product, d;
    // Accumulated with the index that is innermost in the result as its columns.
    constexpr bool kBasesByRows = kOwnRows == kTransposed;
    Accumulators<kType, kBasesByRows ? kRank : kOwn, kBasesByRows ? kOwn : kRank, kWarps> sum;
    const auto d_tile = F::X::tile(d_start);

    const auto compute = [&](int step, int slot) {
        const Step at = steps.next(slot);
        const int64_t row = row_of(at), col = col_of(at);
        if (align_lines(step, at)) __syncthreads();
        const auto a = F::A::tile(a_start(at), padded);
        const auto b = F::B::tile(b_start(at), padded);
        if (has_error && at.first) {
            product.zero();
            product.template add<!kTransposed, kTransposed>(a, b, padded);
        }
        const auto x = F::X::tile(stage(slot)), g = F::X::tile(grad_start(slot));

        const bool grad = uses_grad(at), needs_d = at.last && grad_factor.wanted();
        const int row_end = within(p.rows - row, kRows), col_end = within(p.cols - col, kCols);
        // D in one loop for tiles inside the matrix that have a product of their own; else in one
        // loop for each question, so that none is asked for every element.
        if (!kShared && row_end == kRows && col_end == kCols && grad && has_error && needs_d) {
            const auto visit = [&](auto writes_x) {
                product.for_each_pair([&](int r, int c, float& v, float& w) {
                    const Pair<T> of_x = read_pair(x, r, c), of_g = read_pair(g, r, c);
                    const float e0 = to_float(of_x.first) - v, e1 = to_float(of_x.second) - w;
                    if (decltype(writes_x)::value) write_pair(x, r, c, s * e0, s * e1);
                    write_pair(d_tile, r, c, to_float(of_g.first) - s * e0,
                               to_float(of_g.second) - s * e1);
                });
            };
            grad_x ? visit(std::true_type()) : visit(std::false_type());
        } else {
            if (at.first) d.zero();
            if (grad) {
                d.for_each_pair([&](int r, int c, float& d0, float& d1) {
                    const Pair<T> pair = read_pair(g, r, c);
                    d0 += to_float(pair.first), d1 += to_float(pair.second);
                });
            }
            if (has_error) {
                d.for_each_pair_with(
                    product, [&](int r, int c, float& d0, float& d1, float v, float w) {
                        const Pair<T> pair = read_pair(x, r, c);
                        const float e0 = to_float(pair.first) - v, e1 = to_float(pair.second) - w;
                        d0 -= inner * e0, d1 -= inner * e1;
                        // Only this thread reads x there.
                        if (grad_x) write_pair(x, r, c, s * e0, s * e1);
                    });
            }
            if (needs_d) {  // beyond the edges d may hold 0 times an infinity
                d.for_each_pair([&](int r, int c, float& d0, float& d1) {
                    const bool inside = r < row_end;
                    write_pair(d_tile, r, c, inside && c < col_end ? d0 : 0,
                               inside && c + 1 < col_end ? d1 : 0);
                });
            }
        }
        __syncthreads();
        if (grad_x) {
            T* const to = static_cast<T*>(grad_x) + (at.image * p.rows + row) * p.cols + col;
            write_back<32 * kWarps>(x, to, p.cols, kRows, kCols, p.rows - row, p.cols - col);
        }
        if (!grad_factor.wanted() || !at.last) return;
        if constexpr (kOwnRows && !kTransposed) {
            sum.template add<true, true>(d_tile, b, kCols, kRows, padded);
        } else if constexpr (kOwnRows) {
            sum.template add<false, true>(b, d_tile, kCols, padded, kRows);
        } else if constexpr (!kTransposed) {
            sum.template add<false, false>(a, d_tile, kRows, padded, kCols);
        } else {
            sum.template add<false, true>(d_tile, a, kRows, kCols, padded);
        }
    };

    pipeline(item.steps(), stages, load, compute);
    if (!grad_factor.wanted()) return;
    const int64_t extent = kOwnRows ? p.rows : p.cols;
    // Not kept in a register meanwhile.
    const int partial = item_of(work, p.batch, no_hoist(index)).partial;
    const int64_t offset = partial * extent * p.rank;
    sum.for_each_pair([&](int m, int n, float& v, float& w) {
        const auto put = [&](int64_t own_index, int basis, float value) {
            if (own_index >= extent || basis >= p.rank) return;
            const int64_t at =
                offset + (kBasesByRows ? basis * extent + own_index : own_index * p.rank + basis);
            if (grad_factor.partials) {
                grad_factor.partials[at] = outer * value;
            } else {
                static_cast<T*>(grad_factor.result)[at] = from_float<T>(outer * value);
            }
        };
        if constexpr (kBasesByRows) {
            put(own + n, m, v);
            put(own + n + 1, m, w);
        } else {
            put(own + m, n, v);
            put(own + m, n + 1, w);
        }
    });
}

// kShared: one product for all images.
template <Type kType, bool kTransposed, bool kShared, int kOwn, int kStream, int kRank, int kWarps,
          int kBlocks>
__global__ void __launch_bounds__(32 * kWarps, kBlocks)
    backward_kernel(const __grid_constant__ BackwardParams params) {
    const bool first = blockIdx.x < params.first_blocks;
    const unsigned index = first ? blockIdx.x : blockIdx.x - params.first_blocks;
    if (first != params.cols_first) {
        backward_strip<kType, kTransposed, kShared, true, kOwn, kStream, kRank, kWarps>(
            params, params.row_work, index, params.grad_x_by_rows, params.grad_a);
    } else {
        backward_strip<kType, kTransposed, kShared, false, kOwn, kStream, kRank, kWarps>(
            params, params.col_work, index, params.grad_x_by_cols, params.grad_b);
    }
}

struct SumParams {
    const float* partials;
    void* result;
    int64_t elements;  // of one image's gradient, or of a shared factor's
    int count;         // partial sums of each
    int64_t results;
};

// A factor's gradient from its partial sums, added in order.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumParams params) {
    const int64_t total = params.elements * params.results;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
         i += stride) {
        const float* partial = params.partials +
                               i / params.elements * params.count * params.elements +
                               i % params.elements;
        float sum = 0;
        for (int j = 0; j < params.count; ++j) sum += partial[j * params.elements];
        static_cast<T*>(params.result)[i] = from_float<T>(sum);
    }
}

}  // namespace mfops::cuda
