#include "cpu/reconstruct/op.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/common/elementwise.h"
#include "cpu/common/matrix.h"
#include "cpu/common/memory.h"
#include "cpu/reconstruct/bf16.h"

namespace mfops::cpu {

namespace {

// A tile and what is computed from it stay in a core's L2: 64 K floats are 256 KiB. Forward, whole
// rows are fastest; backward, where every tile adds to rank x columns of a factor's gradient,
// taller tiles do that less often.
constexpr int64_t kTileElements = 64 * 1024;
constexpr int64_t kForwardTileCols = 8192;
constexpr int64_t kBackwardTileCols = 2048;
constexpr int64_t kMinTileRows = 16;

// X as `batch` matrices of rows by cols with unit column stride, X' = A B. Contiguous features are
// X = Y Z with pixels innermost; channels_last ones are the same problem transposed, X^T = Z^T Y^T.
struct Problem {
    Problem(const Tensor& x_, const Tensor& y_, const Tensor& z_, int64_t max_tile_cols)
        : transpose(channels_innermost(x_)),
          y(as_float(y_)),
          z(as_float(z_)),
          x(x_, transpose),
          a(transpose ? z : y, transpose),
          b(transpose ? y : z, transpose),
          batch(x_.size(0)),
          rows(x.rows()),
          cols(x.cols()),
          rank(a.cols()),
          shared(batch == 1 || (y_.dim() == 2 && z_.dim() == 2)),
          products(shared ? 1 : batch) {
        tile_cols = ceil_div(cols, ceil_div(cols, max_tile_cols));
        tile_rows = std::min(rows, std::max(kMinTileRows, kTileElements / tile_cols));
    }

    int64_t elements() const { return batch * rows * cols; }

    // The images that one product stands for.
    int64_t first_image(int64_t product) const { return shared ? 0 : product; }
    int64_t end_image(int64_t product) const { return shared ? batch : product + 1; }

    bool transpose;
    Tensor y, z;
    Batch x, a, b;
    int64_t batch, rows, cols, rank;
    bool shared;
    int64_t products;
    int64_t tile_rows, tile_cols;
};

// Writes X' where there is a place for it; returns the mean squared error.
Tensor forward(const Problem& problem, const Batch* x_hat) {
    const int64_t row_tiles = ceil_div(problem.rows, problem.tile_rows);
    const int64_t col_tiles = ceil_div(problem.cols, problem.tile_cols);
    const int64_t tiles = problem.products * row_tiles * col_tiles;
    // One entry per tile, added in order: the same bits for any number of threads.
    std::vector<double> errors(static_cast<size_t>(tiles));
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        const int64_t size = problem.tile_rows * problem.tile_cols;
        const auto product_scratch = uninitialized(size), x_scratch = uninitialized(size);
        for (int64_t t = begin; t < end; ++t) {
            const int64_t product = t / (row_tiles * col_tiles);
            const int64_t row = t / col_tiles % row_tiles * problem.tile_rows;
            const int64_t col = t % col_tiles * problem.tile_cols;
            const int64_t n_rows = std::min(problem.tile_rows, problem.rows - row);
            const int64_t n_cols = std::min(problem.tile_cols, problem.cols - col);

            const Matrix p =
                x_hat ? x_hat->target(product, row, n_rows, col, n_cols, product_scratch.get())
                      : Matrix{product_scratch.get(), n_rows, n_cols, n_cols, 1};
            multiply(problem.a.matrix(product).block(row, n_rows, 0, problem.rank),
                     problem.b.matrix(product).block(0, problem.rank, col, n_cols), p);
            double error = 0;
            for (int64_t b = problem.first_image(product); b < problem.end_image(product); ++b) {
                const Matrix x = problem.x.read(b, row, n_rows, col, n_cols, x_scratch.get());
                for (int64_t r = 0; r < n_rows; ++r)
                    error += squared_error(x.row(r), p.row(r), n_cols);
            }
            if (x_hat) x_hat->write(p, product, row, col);
            errors[static_cast<size_t>(t)] = error;
        }
    });
    return scalar(std::accumulate(errors.begin(), errors.end(), 0.0) /
                  static_cast<double>(problem.elements()));
}

// Partial sums of one factor's gradient, (products, groups) matrices in the factor's own memory
// order.
struct Partials {
    Partials(const Tensor& factor, const Problem& problem, int64_t groups_, bool wanted)
        : groups(groups_),
          memory(
              torch::stable::empty({wanted ? problem.products * groups : 0,
                                    factor.size(factor.dim() - 2), factor.size(factor.dim() - 1)},
                                   ScalarType::Float)),
          batch(memory, problem.transpose) {}

    Matrix matrix(int64_t product, int64_t group) const {
        return batch.matrix(product * groups + group);
    }

    int64_t groups;
    Tensor memory;
    Batch batch;
};

struct Tile {
    int64_t row, n_rows, col, n_cols;
    Matrix in(float* memory) const { return {memory, n_rows, n_cols, n_cols, 1}; }
};

// What the backward pass reads and writes besides the factors' gradients.
struct Gradients {
    std::optional<Batch> x_hat;  // G', for each image or, of shared factors, already summed
    bool x_hat_per_image;
    std::optional<Batch> x;  // dX, where it is wanted
    bool error;              // whether the error takes part, with
    float scale;             // 2 g / (B C N)
};

// One thread's memory for the tiles of a backward pass.
struct Scratch {
    explicit Scratch(int64_t size)
        : p(uninitialized(size)),
          d(uninitialized(size)),
          x(uninitialized(size)),
          g(uninitialized(size)),
          grad_x(uninitialized(size)) {}
    std::unique_ptr<float[]> p, d, x, g, grad_x;
};

// Writes a tile of dX for every image that `product` stands for; returns the tile of D, the sum
// over those images of G' - s (X - X').
Matrix backward_tile(const Problem& problem, const Gradients& grad, int64_t product, const Tile& t,
                     const Scratch& scratch) {
    const Matrix d = t.in(scratch.d.get()), p = t.in(scratch.p.get());
    if (!grad.x_hat) std::fill_n(d.data, t.n_rows * t.n_cols, 0.0f);
    if (grad.error) {
        multiply(problem.a.matrix(product).block(t.row, t.n_rows, 0, problem.rank),
                 problem.b.matrix(product).block(0, problem.rank, t.col, t.n_cols), p);
    }
    const int64_t first = problem.first_image(product);
    for (int64_t i = first; i < problem.end_image(product); ++i) {
        if (grad.x_hat && (grad.x_hat_per_image || i == first)) {
            const Matrix g = grad.x_hat->read(i, t.row, t.n_rows, t.col, t.n_cols, scratch.g.get());
            for (int64_t r = 0; r < t.n_rows; ++r) {
                if (i == first) {
                    std::copy_n(g.row(r), t.n_cols, d.row(r));
                } else {
                    add(d.row(r), g.row(r), t.n_cols);
                }
            }
        }
        if (!grad.error) continue;
        const Matrix x = problem.x.read(i, t.row, t.n_rows, t.col, t.n_cols, scratch.x.get());
        if (!grad.x) {
            for (int64_t r = 0; r < t.n_rows; ++r) {
                subtract_error(x.row(r), p.row(r), grad.scale, d.row(r), t.n_cols);
            }
            continue;
        }
        const Matrix grad_x =
            grad.x->target(i, t.row, t.n_rows, t.col, t.n_cols, scratch.grad_x.get());
        for (int64_t r = 0; r < t.n_rows; ++r) {
            write_error(x.row(r), p.row(r), grad.scale, d.row(r), grad_x.row(r), t.n_cols);
        }
        grad.x->write(grad_x, i, t.row, t.col);
    }
    return d;
}

}  // namespace

std::tuple<Tensor, Tensor> reconstruct(const Tensor& x, const Tensor& y, const Tensor& z,
                                       bool /*tf32*/) {
#ifdef MFOPS_WITH_BF16
    if (bf16::takes(x)) return bf16::reconstruct(x, y, z);
#endif
    const Problem problem(x, y, z, kForwardTileCols);
    const Tensor x_hat = new_features(x, y.dim() == 3 || z.dim() == 3);
    const Batch out(x_hat, problem.transpose);
    return {x_hat, forward(problem, &out)};
}

Tensor mse(const Tensor& x, const Tensor& y, const Tensor& z, bool /*tf32*/) {
#ifdef MFOPS_WITH_BF16
    if (bf16::takes(x)) return bf16::mse(x, y, z);
#endif
    return forward(Problem(x, y, z, kForwardTileCols), nullptr);
}

std::tuple<Tensor, Tensor, Tensor> reconstruct_backward(const std::optional<Tensor>& grad_x_hat,
                                                        const std::optional<Tensor>& grad_mse,
                                                        const Tensor& x, const Tensor& y,
                                                        const Tensor& z, bool need_x, bool need_y,
                                                        bool need_z, bool /*tf32*/) {
#ifdef MFOPS_WITH_BF16
    if (bf16::takes(x, grad_x_hat))
        return bf16::reconstruct_backward(grad_x_hat, grad_mse, x, y, z, need_x, need_y, need_z);
#endif
    const Problem problem(x, y, z, kBackwardTileCols);
    const bool need_a = problem.transpose ? need_z : need_y;
    const bool need_b = problem.transpose ? need_y : need_z;
    // An operator's outputs may not share memory, empty or not.
    const auto none = [&] { return torch::stable::empty({0}, x.scalar_type()); };
    Tensor grad_x = need_x ? new_features(x) : none();
    if (need_x && !grad_mse) torch::stable::zero_(grad_x);

    const Groups groups(problem.products, problem.rows, problem.cols, problem.rank);
    const Partials grad_y(y, problem, problem.transpose ? groups.rows : groups.cols, need_y);
    const Partials grad_z(z, problem, problem.transpose ? groups.cols : groups.rows, need_z);
    const Partials& grad_a = problem.transpose ? grad_z : grad_y;
    const Partials& grad_b = problem.transpose ? grad_y : grad_z;

    Gradients grad{.x_hat = std::nullopt,
                   .x_hat_per_image = grad_x_hat && grad_x_hat->dim() == 3,
                   .x = std::nullopt,
                   .error = grad_mse.has_value(),
                   .scale = error_scale(grad_mse, problem.elements())};
    if (grad_x_hat) grad.x_hat.emplace(*grad_x_hat, problem.transpose);
    if (need_x) grad.x.emplace(grad_x, problem.transpose);

    torch::stable::parallel_for(0, groups.items(), 1, [&](int64_t begin, int64_t end) {
        const Scratch scratch(problem.tile_rows * problem.tile_cols);
        const auto factor_scratch =
            uninitialized(problem.rank * std::max(problem.tile_rows, problem.tile_cols));
        for (int64_t item = begin; item < end; ++item) {
            const auto [product, row_group, col_group, row_begin, row_end, col_begin, col_end] =
                groups.part(item);

            for (int64_t row = row_begin; row < row_end; row += problem.tile_rows) {
                for (int64_t col = col_begin; col < col_end; col += problem.tile_cols) {
                    const Tile t{row, std::min(problem.tile_rows, row_end - row), col,
                                 std::min(problem.tile_cols, col_end - col)};
                    const Matrix d = backward_tile(problem, grad, product, t, scratch);
                    if (need_a) {
                        multiply_add(d,
                                     problem.b.matrix(product)
                                         .block(0, problem.rank, t.col, t.n_cols)
                                         .transposed(),
                                     grad_a.matrix(product, col_group)
                                         .block(t.row, t.n_rows, 0, problem.rank),
                                     col == col_begin, factor_scratch.get());
                    }
                    if (need_b) {
                        multiply_add(problem.a.matrix(product)
                                         .block(t.row, t.n_rows, 0, problem.rank)
                                         .transposed(),
                                     d,
                                     grad_b.matrix(product, row_group)
                                         .block(0, problem.rank, t.col, t.n_cols),
                                     row == row_begin, factor_scratch.get());
                    }
                }
            }
        }
    });
    return {grad_x, need_y ? add_partials(grad_y.memory, y, false) : none(),
            need_z ? add_partials(grad_z.memory, z, false) : none()};
}

}  // namespace mfops::cpu
