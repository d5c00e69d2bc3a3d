// The rounds that find Y and Z of each image, for any way to make the products.
//
// A `Products` makes those of one tile of X, with a thread's own memory for it:
//   Products(x, sizes)
//   set_bases(y, gram)          Y^T of an image, and Y^T Y where nmf asks for it
//   load(tile)                  the tile that the others are about
//   project(out)                out = Y^T X
//   scale_by_gram(z, out)       out = Y^T Y Z
//   add_sums(z, sums, first)    sums = Z X^T, or sums += Z X^T after the first tile
//   add_weights(z, out, first)  likewise Z Z^T
//   write_squares(squares)      the squared lengths of the tile's columns
// After the rounds, into features of the type `Output`:
//   reconstruct(z, x_hat)       X' = Y Z; returns the squared error
//   project_gradient(z, s, upstream, out)   out = Y^T (G' - E) with E = s (X - Y Z); without z
//   there
//                               is no E, without upstream no G'
//   write_gradient(v, with_error, grad)     Y V, plus the E of project_gradient
// and `kTileElements`, how many of X and of what is computed from it a tile has, and
// `kBackwardTileElements`, where the last two are called.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "cpu/common/elementwise.h"
#include "cpu/common/matrix.h"
#include "cpu/common/memory.h"

namespace mfops::cpu {

inline constexpr float kEps = 1e-6f;
inline constexpr float kShortest = 1e-12f;  // of a column of X, where that is divided by its length

inline constexpr int64_t kMinTileCols = 64;

enum class Method { kEM, kNMF, kVQ, kCD };

inline Method method_named(const std::string& name) {
    if (name == "em") return Method::kEM;
    if (name == "nmf") return Method::kNMF;
    if (name == "vq") return Method::kVQ;
    STD_TORCH_CHECK(name == "cd", "method: expected em, nmf, vq or cd, got ", name);
    return Method::kCD;
}

inline Matrix packed(float* memory, int64_t rows, int64_t cols) {
    return {memory, rows, cols, cols, 1};
}

// A batch of float matrices of its own.
struct Matrices {
    Matrices(int64_t count, int64_t rows, int64_t cols)
        : memory(torch::stable::empty({count, rows, cols}, ScalarType::Float)),
          batch(memory, false) {}
    Matrix operator[](int64_t i) const { return batch.matrix(i); }

    Tensor memory;
    Batch batch;
};

struct Sizes {
    Sizes(const Tensor& x, int64_t rank_, int64_t tile_elements)
        : batch(x.size(0)), channels(x.size(1)), pixels(x.size(2)), rank(rank_) {
        const int64_t max_cols = tile_elements / (channels + rank);
        // At least as many tiles as keep every thread busy.
        const int64_t wanted =
            std::max(ceil_div(pixels, std::max(max_cols, kMinTileCols)), groups_for_threads(batch));
        // Whole blocks of a product's columns, but for an image's last tile.
        const int64_t even = ceil_div(pixels, wanted);
        tile_cols = std::min(pixels, ceil_div(even, kMinTileCols) * kMinTileCols);
        tiles = ceil_div(pixels, tile_cols);
    }

    int64_t batch, channels, pixels, rank;
    int64_t tile_cols, tiles;  // columns of a tile, tiles of an image
};

struct Tile {
    int64_t image, col, n;
};

// Calls f(tile, its number, the thread's own `Scratch(x, sizes)`) for every tile.
template <class Scratch, class F>
void for_each_tile(const Tensor& x, const Sizes& sizes, const F& f) {
    const int64_t work = sizes.channels * sizes.rank * sizes.tile_cols;
    torch::stable::parallel_for(
        0, sizes.batch * sizes.tiles, grain(work), [&](int64_t begin, int64_t end) {
            Scratch scratch(x, sizes);
            for (int64_t t = begin; t < end; ++t) {
                const int64_t col = t % sizes.tiles * sizes.tile_cols;
                f(Tile{t / sizes.tiles, col, std::min(sizes.tile_cols, sizes.pixels - col)}, t,
                  scratch);
            }
        });
}

// Y and Z of every image, and the rounds that find them. Bases are rows here: `y` is Y^T.
template <class Products>
class Rounds {
   public:
    // Only vq and cd look at the inverse temperature.
    Rounds(const Tensor& x, const Tensor& y0, const std::string& method, int64_t steps,
           double inverse_temperature = 0)
        : method_(method_named(method)),
          inverse_temperature_(static_cast<float>(inverse_temperature)),
          x_(x),
          sizes(x, y0.size(y0.dim() - 1), Products::kTileElements),
          y(sizes.batch, sizes.rank, sizes.channels),
          z(sizes.batch, sizes.rank, sizes.pixels),
          gram(is_nmf() ? sizes.batch : 0, sizes.rank, sizes.rank),
          inverse_lengths_(has_cosines() ? sizes.batch : 0, 1, sizes.pixels),
          groups_(bounded_groups(groups_for_threads(sizes.batch), sizes.pixels, sizes.rank)),
          sums_(sizes.batch * groups_, sizes.rank, sizes.channels),
          weights_(sizes.batch * groups_, sizes.rank, is_nmf() ? sizes.rank : 1) {
        Tensor start = y.memory;
        torch::stable::copy_(start, torch::stable::transpose(y0, -2, -1));
        for (int64_t image = 0; image < sizes.batch; ++image) {
            if (is_nmf()) multiply(y[image], y[image].transposed(), gram[image]);
            if (method_ == Method::kVQ) normalize_bases(image);
        }
        for (int64_t step = 0; step < steps; ++step) {
            update_coefficients(step == 0);
            update_bases(step + 1 == steps);
        }
    }

    Tensor bases() const {
        return torch::stable::contiguous(torch::stable::transpose(y.memory, 1, 2));
    }

    void set_bases(Products& products, int64_t image) const {
        products.set_bases(y[image], is_nmf() ? gram[image] : Matrix{});
    }

   private:
    Method method_;
    float inverse_temperature_;
    const Tensor x_;

   public:
    const Sizes sizes;
    const Matrices y, z;
    const Matrices gram;  // Y^T Y, of nmf alone

   private:
    bool is_nmf() const { return method_ == Method::kNMF; }
    bool has_cosines() const { return method_ == Method::kVQ || method_ == Method::kCD; }

    // The one pass over X: the next Z and, of each group of columns, Z X^T with Z Z^T or the sums
    // of Z's rows. The groups' sums are added in order, whichever thread computed them.
    void update_coefficients(bool first_round) const {
        const int64_t items = sizes.batch * groups_;
        const int64_t work = 2 * sizes.channels * sizes.rank * ceil_div(sizes.pixels, groups_);
        torch::stable::parallel_for(0, items, grain(work), [&](int64_t begin, int64_t end) {
            Products products(x_, sizes);
            const auto numerators = uninitialized(sizes.rank * sizes.tile_cols);
            const auto denominators = uninitialized(sizes.rank * sizes.tile_cols);
            for (int64_t item = begin; item < end; ++item) {
                const int64_t image = item / groups_, group = item % groups_;
                const int64_t col_begin = sizes.pixels * group / groups_;
                const int64_t col_end = sizes.pixels * (group + 1) / groups_;
                set_bases(products, image);
                for (int64_t col = col_begin; col < col_end; col += sizes.tile_cols) {
                    const Tile t{image, col, std::min(sizes.tile_cols, col_end - col)};
                    products.load(t);
                    if (first_round && has_cosines()) write_inverse_lengths(products, t);
                    const Matrix z_tile = z[image].block(0, sizes.rank, col, t.n);
                    if (is_nmf()) {
                        update_nmf(products, z_tile, first_round,
                                   packed(numerators.get(), sizes.rank, t.n),
                                   packed(denominators.get(), sizes.rank, t.n));
                    } else {
                        assign(products, z_tile, t);
                    }
                    add_to_sums(products, z_tile, item, col == col_begin);
                }
            }
        });
    }

    // Z = softmax(Y^T X), of cosines over the temperature for vq and cd.
    void assign(const Products& products, const Matrix& z_tile, const Tile& t) const {
        products.project(z_tile);
        if (has_cosines()) {
            const float* factors = inverse_lengths_[t.image].data + t.col;
            for (int64_t k = 0; k < sizes.rank; ++k) multiply_elements(z_tile.row(k), factors, t.n);
        }
        softmax_columns(z_tile.data, sizes.rank, t.n, z_tile.row_stride);
    }

    // Z *= Y^T X / (Y^T Y Z + eps), from softmax(Y^T X) in the first round.
    void update_nmf(const Products& products, const Matrix& z_tile, bool first_round,
                    const Matrix& numerators, const Matrix& denominators) const {
        products.project(numerators);
        if (first_round) {
            for (int64_t k = 0; k < sizes.rank; ++k)
                std::copy_n(numerators.row(k), z_tile.cols, z_tile.row(k));
            softmax_columns(z_tile.data, sizes.rank, z_tile.cols, z_tile.row_stride);
        }
        products.scale_by_gram(z_tile, denominators);
        for (int64_t k = 0; k < sizes.rank; ++k) {
            multiplicative_update(z_tile.row(k), numerators.row(k), denominators.row(k), kEps,
                                  z_tile.cols);
        }
    }

    void add_to_sums(const Products& products, const Matrix& z_tile, int64_t item,
                     bool first_tile) const {
        products.add_sums(z_tile, sums_[item], first_tile);
        if (is_nmf()) return products.add_weights(z_tile, weights_[item], first_tile);
        float* weights = weights_[item].data;
        for (int64_t k = 0; k < sizes.rank; ++k) {
            const float weight = static_cast<float>(sum(z_tile.row(k), z_tile.cols));
            weights[k] = first_tile ? weight : weights[k] + weight;
        }
    }

    // The inverse temperature over the lengths of a tile's columns.
    void write_inverse_lengths(const Products& products, const Tile& t) const {
        float* squares = inverse_lengths_[t.image].data + t.col;
        products.write_squares(squares);
        inverse_root(squares, inverse_temperature_, kShortest, t.n);
    }

    void update_bases(bool last_round) const {
        const int64_t work = sizes.channels * sizes.rank * (is_nmf() ? 2 * sizes.rank : 1);
        torch::stable::parallel_for(0, sizes.batch, grain(work), [&](int64_t begin, int64_t end) {
            const auto scratch = uninitialized(sizes.rank * sizes.channels);
            for (int64_t image = begin; image < end; ++image) {
                const Matrix sums = total(sums_, image), weights = total(weights_, image);
                if (is_nmf()) {
                    const Matrix denominators = packed(scratch.get(), sizes.rank, sizes.channels);
                    multiply(weights, y[image], denominators);
                    multiplicative_update(y[image].data, sums.data, denominators.data, kEps,
                                          sizes.rank * sizes.channels);
                    multiply(y[image], y[image].transposed(), gram[image]);
                    continue;
                }
                for (int64_t k = 0; k < sizes.rank; ++k) {
                    std::copy_n(sums.row(k), sizes.channels, y[image].row(k));
                    scale(y[image].row(k), 1 / (kEps + weights.data[k]), sizes.channels);
                }
                // vq returns the means themselves.
                if (method_ != Method::kVQ || !last_round) normalize_bases(image);
            }
        });
    }

    void normalize_bases(int64_t image) const {
        for (int64_t k = 0; k < sizes.rank; ++k) {
            float* base = y[image].row(k);
            const float length =
                static_cast<float>(std::sqrt(sum_of_squares(base, sizes.channels)));
            const float divisor =
                method_ == Method::kEM ? kEps + length : (length < kEps ? kEps : length);
            scale(base, 1 / divisor, sizes.channels);
        }
    }

    // An image's partial sums, added up in the first of them.
    Matrix total(const Matrices& partials, int64_t image) const {
        const Matrix first = partials[image * groups_];
        for (int64_t g = 1; g < groups_; ++g) {
            add(first.data, partials[image * groups_ + g].data, first.rows * first.cols);
        }
        return first;
    }

    Matrices inverse_lengths_;
    int64_t groups_;
    Matrices sums_, weights_;
};

}  // namespace mfops::cpu
