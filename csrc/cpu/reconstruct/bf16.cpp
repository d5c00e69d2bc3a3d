#include "cpu/reconstruct/bf16.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/common/bf16_features.h"
#include "cpu/common/memory.h"

namespace mfops::cpu::bf16 {

#ifdef MFOPS_WITH_BF16

namespace {

// A tile's packed factors and, backward, D in both orders stay in a core's L2.
constexpr int64_t kForwardTileElements = 128 * 1024;
constexpr int64_t kForwardTileCols = 1024;
constexpr int64_t kBackwardTileElements = 36 * 1024;
constexpr int64_t kBackwardTileCols = 512;

// X' = A B, as in op.cpp: A = Y and B = Z or, transposed, A = Z^T and B = Y^T.
struct Problem {
    Problem(const Tensor& x_, const Tensor& y_, const Tensor& z_, int64_t max_tile_cols,
            int64_t tile_elements)
        : transpose(channels_innermost(x_)),
          y(torch::stable::contiguous(y_)),
          z(torch::stable::contiguous(z_)),
          x(x_, transpose),
          batch(x_.size(0)),
          rows(x_.size(transpose ? 2 : 1)),
          cols(x_.size(transpose ? 1 : 2)),
          rank(y_.size(y_.dim() - 1)),
          shared(batch == 1 || (y_.dim() == 2 && z_.dim() == 2)),
          products(shared ? 1 : batch) {
        // Whole panels, but for the last tile.
        tile_cols = ceil_div(cols, ceil_div(cols, max_tile_cols));
        tile_cols = std::min(cols, ceil_div(tile_cols, kPanelCols) * kPanelCols);
        tile_rows = std::max<int64_t>(1, tile_elements / tile_cols / kBlockRows) * kBlockRows;
        tile_rows = std::min(rows, tile_rows);
    }

    int64_t elements() const { return batch * rows * cols; }
    // The images that one product stands for, from this one on.
    int64_t first_image(int64_t product) const { return shared ? 0 : product; }
    int64_t images() const { return shared ? batch : 1; }

    // What is read of a factor: all bases and `n` rows or columns of X from `begin` on.
    Rows bases(int64_t product, int64_t begin, int64_t n) const {
        const auto* data = static_cast<const uint16_t*>(y.data_ptr());
        const int64_t image = y.dim() == 3 ? product * y.stride(0) : 0;
        return {data + image + begin * rank, n, rank, rank};
    }
    Rows coefficients(int64_t product, int64_t begin, int64_t n) const {
        const auto* data = static_cast<const uint16_t*>(z.data_ptr());
        const int64_t image = z.dim() == 3 ? product * z.stride(0) : 0;
        return {data + image + begin, rank, n, z.size(z.dim() - 1)};
    }

    bool transpose;
    Tensor y, z;
    Features x;
    int64_t batch, rows, cols, rank;
    bool shared;
    int64_t products;
    int64_t tile_rows, tile_cols;
};

struct Tile {
    int64_t product, row, n_rows, col, n_cols;
};

// Writes X' where there is a place for it; returns the mean squared error.
Tensor forward(const Problem& problem, const Features* x_hat) {
    const int64_t row_tiles = ceil_div(problem.rows, problem.tile_rows);
    const int64_t col_tiles = ceil_div(problem.cols, problem.tile_cols);
    const int64_t tiles = problem.products * row_tiles * col_tiles;
    // One entry per tile, added in order: the same bits for any number of threads.
    std::vector<double> errors(static_cast<size_t>(tiles));
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        const Packed left(problem.tile_rows, problem.rank);
        const Packed right(problem.tile_cols, problem.rank);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t p = i / (row_tiles * col_tiles);
            const int64_t row = i / col_tiles % row_tiles * problem.tile_rows;
            const int64_t col = i % col_tiles * problem.tile_cols;
            const int64_t n_rows = std::min(problem.tile_rows, problem.rows - row);
            const int64_t n_cols = std::min(problem.tile_cols, problem.cols - col);
            const bool t = problem.transpose;
            const Rows a = left.left(
                t ? problem.coefficients(p, row, n_rows) : problem.bases(p, row, n_rows), t);
            const Pairs b = right.right(
                t ? problem.bases(p, col, n_cols) : problem.coefficients(p, col, n_cols), t);
            Reconstruct epilogue{.x = problem.x.at(problem.first_image(p), row, col),
                                 .x_stride = problem.x.row_stride,
                                 .image_stride = problem.x.image_stride,
                                 .images = problem.images(),
                                 .x_hat = x_hat ? x_hat->at(p, row, col) : nullptr,
                                 .x_hat_stride = x_hat ? x_hat->row_stride : 0,
                                 .error = 0};
            product(a, b, epilogue);
            errors[static_cast<size_t>(i)] = epilogue.error;
        }
    });
    return scalar(std::accumulate(errors.begin(), errors.end(), 0.0) /
                  static_cast<double>(problem.elements()));
}

// What the backward pass reads and writes besides the factors' gradients.
struct Gradients {
    std::optional<Features> x_hat;  // G', for each image or, of shared factors, already summed
    bool x_hat_per_image;
    std::optional<Features> x;  // dX, where it is wanted
    bool error;                 // whether the error takes part, with
    float scale;                // 2 g / (B C N)
};

// One thread's memory for the tiles of a backward pass.
struct Scratch {
    explicit Scratch(const Problem& p)
        : a(p.tile_rows, p.rank),
          a_transposed(p.tile_rows, p.rank),
          b(p.tile_cols, p.rank),
          b_transposed(p.tile_cols, p.rank),
          d_rows(p.tile_rows * even(p.tile_cols)),
          d_pairs(pairs_size(p.tile_rows, p.tile_cols)),
          strip(Strip::size(p.tile_cols)),
          d_strip(Strip::size(p.tile_cols)) {}
    Packed a, a_transposed, b, b_transposed;
    Buffer<uint16_t> d_rows;
    Buffer<uint32_t> d_pairs;
    Buffer<float> strip, d_strip;
};

template <bool kError>
void backward_tile(const Problem& problem, const Gradients& grad, const Tile& t, const Rows& a,
                   const Pairs& b, const Scratch& scratch) {
    const int64_t image = problem.first_image(t.product), images = problem.images();
    const bool g_per_image = grad.x_hat && grad.x_hat_per_image;
    const Backward<kError> epilogue{
        .x = problem.x.at(image, t.row, t.col),
        .x_stride = problem.x.row_stride,
        .x_image_stride = problem.x.image_stride,
        .g = grad.x_hat ? grad.x_hat->at(g_per_image ? image : 0, t.row, t.col) : nullptr,
        .g_stride = grad.x_hat ? grad.x_hat->row_stride : 0,
        .g_image_stride = grad.x_hat ? grad.x_hat->image_stride : 0,
        .g_images = g_per_image ? images : (grad.x_hat ? 1 : 0),
        .grad_x = kError && grad.x ? grad.x->at(image, t.row, t.col) : nullptr,
        .grad_x_stride = grad.x ? grad.x->row_stride : 0,
        .grad_x_image_stride = grad.x ? grad.x->image_stride : 0,
        .e = nullptr,
        .e_stride = 0,
        .images = images,
        .scale = grad.scale,
        .d_rows = scratch.d_rows.get(),
        .d_rows_stride = even(t.n_cols),
        .d_pairs_data = scratch.d_pairs.get(),
        .d_pairs = Pairs{scratch.d_pairs.get(), even(t.n_rows) / 2, t.n_cols},
        .d = images == 1 ? scratch.strip.get() : scratch.d_strip.get()};
    // Without the error X' is not needed: the sums of no pairs are zeros.
    product_by_strips(a, kError ? b : Pairs{b.data, 0, b.cols}, scratch.strip.get(), epilogue);
}

// Partial sums of A's and B's gradient, (products * groups, rows, rank) and (.., rank, cols).
struct Partials {
    Tensor memory;
    float* at(int64_t matrix, int64_t row, int64_t col) const {
        return static_cast<float*>(memory.data_ptr()) + matrix * memory.stride(0) +
               row * memory.stride(1) + col;
    }
};

}  // namespace

std::tuple<Tensor, Tensor> reconstruct(const Tensor& x, const Tensor& y, const Tensor& z) {
    const Problem problem(x, y, z, kForwardTileCols, kForwardTileElements);
    const Tensor x_hat = new_features(x, y.dim() == 3 || z.dim() == 3);
    const Features out(x_hat, problem.transpose);
    return {x_hat, forward(problem, &out)};
}

Tensor mse(const Tensor& x, const Tensor& y, const Tensor& z) {
    return forward(Problem(x, y, z, kForwardTileCols, kForwardTileElements), nullptr);
}

std::tuple<Tensor, Tensor, Tensor> reconstruct_backward(const std::optional<Tensor>& grad_x_hat,
                                                        const std::optional<Tensor>& grad_mse,
                                                        const Tensor& x, const Tensor& y,
                                                        const Tensor& z, bool need_x, bool need_y,
                                                        bool need_z) {
    const Problem problem(x, y, z, kBackwardTileCols, kBackwardTileElements);
    const bool transpose = problem.transpose;
    const bool need_a = transpose ? need_z : need_y, need_b = transpose ? need_y : need_z;
    // An operator's outputs may not share memory, empty or not.
    const auto none = [&] { return torch::stable::empty({0}, x.scalar_type()); };
    Tensor grad_x = need_x ? new_features(x) : none();
    if (need_x && !grad_mse) torch::stable::zero_(grad_x);
    const Groups groups(problem.products, problem.rows, problem.cols, problem.rank);
    const Partials grad_a{torch::stable::empty(
        {need_a ? problem.products * groups.cols : 0, problem.rows, problem.rank},
        ScalarType::Float)};
    const Partials grad_b{torch::stable::empty(
        {need_b ? problem.products * groups.rows : 0, problem.rank, problem.cols},
        ScalarType::Float)};

    Gradients grad{.x_hat = std::nullopt,
                   .x_hat_per_image = grad_x_hat && grad_x_hat->dim() == 3,
                   .x = std::nullopt,
                   .error = grad_mse.has_value(),
                   .scale = error_scale(grad_mse, problem.elements())};
    if (grad_x_hat) grad.x_hat.emplace(*grad_x_hat, transpose);
    if (need_x) grad.x.emplace(grad_x, transpose);

    torch::stable::parallel_for(0, groups.items(), 1, [&](int64_t begin, int64_t end) {
        const Scratch scratch(problem);
        for (int64_t item = begin; item < end; ++item) {
            const auto [p, row_group, col_group, row_begin, row_end, col_begin, col_end] =
                groups.part(item);

            for (int64_t col = col_begin; col < col_end; col += problem.tile_cols) {
                const int64_t n_cols = std::min(problem.tile_cols, col_end - col);
                const Rows b_rows = transpose ? problem.bases(p, col, n_cols)
                                              : problem.coefficients(p, col, n_cols);
                const Pairs b = scratch.b.right(b_rows, transpose);
                const Pairs b_transposed = scratch.b_transposed.right(b_rows, !transpose);
                for (int64_t row = row_begin; row < row_end; row += problem.tile_rows) {
                    const Tile t{p, row, std::min(problem.tile_rows, row_end - row), col, n_cols};
                    const Rows a_rows = transpose ? problem.coefficients(p, row, t.n_rows)
                                                  : problem.bases(p, row, t.n_rows);
                    const Rows a = scratch.a.left(a_rows, transpose);
                    if (grad.error) {
                        backward_tile<true>(problem, grad, t, a, b, scratch);
                    } else {
                        backward_tile<false>(problem, grad, t, a, b, scratch);
                    }
                    if (need_a) {
                        const int64_t d_cols = even(t.n_cols);
                        multiply(Rows{scratch.d_rows.get(), t.n_rows, d_cols, d_cols}, b_transposed,
                                 grad_a.at(p * groups.cols + col_group, row, 0), problem.rank,
                                 col != col_begin);
                    }
                    if (need_b) {
                        multiply(scratch.a_transposed.left(a_rows, !transpose),
                                 Pairs{scratch.d_pairs.get(), even(t.n_rows) / 2, t.n_cols},
                                 grad_b.at(p * groups.rows + row_group, 0, col), problem.cols,
                                 row != row_begin);
                    }
                }
            }
        }
    });
    const auto total = [&](const Partials& partials, const Tensor& factor, bool needed) {
        return needed ? add_partials(partials.memory, factor, transpose) : none();
    };
    return {grad_x, total(transpose ? grad_b : grad_a, y, need_y),
            total(transpose ? grad_a : grad_b, z, need_z)};
}

#endif

}  // namespace mfops::cpu::bf16
