// The products of a tile of X in bfloat16, with float32 sums: see rounds.h. Bases, coefficients and
// D are rounded to bfloat16 where they are multiplied; they stay in float32 between the rounds.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/common/bf16_features.h"
#include "cpu/common/matrix.h"
#include "cpu/common/memory.h"
#include "cpu/factorize/rounds.h"

namespace mfops::cpu::bf16 {

#ifdef MFOPS_WITH_BF16

class Products {
   public:
    // The tile's pairs, half a MiB, and coefficients stay in a core's L2.
    static constexpr int64_t kTileElements = 256 * 1024;
    // With E in float32 beside them.
    static constexpr int64_t kBackwardTileElements = 96 * 1024;
    using Output = Features;

    Products(const Tensor& x, const Sizes& sizes)
        : transpose_(channels_innermost(x)),
          channels_(sizes.channels),
          rank_(sizes.rank),
          features_(x, transpose_),
          y_(rank_ * even(channels_)),
          y_pairs_memory_(transpose_ ? pairs_size(channels_, rank_) : 0),
          gram_(rank_ * even(rank_)),
          z_rows_(rank_ * even(sizes.tile_cols)),
          x_rows_(even(channels_) * even(sizes.tile_cols)),
          z_pairs_(either_pairs_size(rank_, std::max(channels_, sizes.tile_cols))),
          x_pairs_(either_pairs_size(channels_, sizes.tile_cols)),
          left_pairs_(either_pairs_size(rank_, std::max(channels_, sizes.tile_cols))),
          left_(even(rank_) * std::max(channels_, sizes.tile_cols)),
          d_rows_(even(channels_) * even(sizes.tile_cols)),
          e_(channels_ * sizes.tile_cols),
          strip_(Strip::size(std::max(channels_, sizes.tile_cols))) {}

    void set_bases(const Matrix& y, const Matrix& gram) {
        y_rows_ = round_rows(y.data, rank_, channels_, y.row_stride, y_.get());
        if (transpose_) y_pairs_ = pair_cols(y_rows_, y_pairs_memory_.get());
        if (gram.data) gram_rows_ = round_rows(gram.data, rank_, rank_, rank_, gram_.get());
    }
    void load(const Tile& t) {
        tile_ = t;
        x_ = rows_of(features_);
    }

    void project(const Matrix& out) const { project(x_, out); }
    void scale_by_gram(const Matrix& z, const Matrix& out) const {
        multiply(gram_rows_, pair_rows(rounded(z), z_pairs_.get()), out.data, out.row_stride,
                 false);
    }
    void add_sums(const Matrix& z, const Matrix& sums, bool first) const {
        if (transpose_) {
            const Pairs x = pair_rows(x_, x_pairs_.get());
            return multiply(rounded(z), x, sums.data, sums.row_stride, !first);
        }
        multiply_transposed(with_even_cols(x_, x_rows_.get()),
                            pair_cols(rounded(z), z_pairs_.get()), sums.data, sums.row_stride,
                            !first);
    }
    void add_weights(const Matrix& z, const Matrix& weights, bool first) const {
        const Rows rows = rounded(z);
        multiply(rows, pair_cols(rows, z_pairs_.get()), weights.data, weights.row_stride, !first);
    }
    void write_squares(float* squares) const {
        if (transpose_) {
            for (int64_t i = 0; i < tile_.n; ++i)
                squares[i] = static_cast<float>(sum_of_squares(x_.data + i * x_.stride, channels_));
            return;
        }
        std::fill_n(squares, tile_.n, 0.0f);
        for (int64_t c = 0; c < channels_; ++c)
            add_squares(squares, x_.data + c * x_.stride, tile_.n);
    }

    double reconstruct(const Matrix& z, const Output& x_hat) const {
        Reconstruct epilogue{.x = x_.data,
                             .x_stride = x_.stride,
                             .image_stride = 0,
                             .images = 1,
                             .x_hat = place(x_hat),
                             .x_hat_stride = x_hat.row_stride,
                             .error = 0};
        multiply_bases(z, epilogue);
        return epilogue.error;
    }

    void project_gradient(const Matrix* z, float s, const Output* upstream,
                          const Matrix& out) const {
        if (!z) return project(rows_of(*upstream), out);
        const int64_t stride = even(x_.cols);
        const Pairs d_pairs{x_pairs_.get(), even(x_.rows) / 2, x_.cols};
        const Backward<true> epilogue{.x = x_.data,
                                      .x_stride = x_.stride,
                                      .x_image_stride = 0,
                                      .g = upstream ? place(*upstream) : nullptr,
                                      .g_stride = upstream ? upstream->row_stride : 0,
                                      .g_image_stride = 0,
                                      .g_images = upstream ? 1 : 0,
                                      .grad_x = nullptr,
                                      .grad_x_stride = 0,
                                      .grad_x_image_stride = 0,
                                      .e = e_.get(),
                                      .e_stride = x_.cols,
                                      .images = 1,
                                      .scale = s,
                                      .d_rows = d_rows_.get(),
                                      .d_rows_stride = stride,
                                      .d_pairs_data = x_pairs_.get(),
                                      .d_pairs = d_pairs,
                                      .d = strip_.get()};
        const auto [left, right] = bases_and(*z);
        product_by_strips(left, right, strip_.get(), epilogue);
        if (transpose_) {
            const Rows d{d_rows_.get(), x_.rows, x_.cols, stride};
            multiply_transposed(d, y_pairs_, out.data, out.row_stride, false);
        } else {
            multiply(y_rows_, d_pairs, out.data, out.row_stride, false);
        }
    }

    void write_gradient(const Matrix& v, bool with_error, const Output& grad) const {
        multiply_bases(
            v, AddError{with_error ? e_.get() : nullptr, x_.cols, place(grad), grad.row_stride});
    }

   private:
    // For the pairs of rows, or of columns, of a matrix.
    static int64_t either_pairs_size(int64_t rows, int64_t cols) {
        return std::max(pairs_size(rows, cols), pairs_size(cols, rows));
    }

    uint16_t* place(const Features& f) const {
        return f.at(tile_.image, transpose_ ? tile_.col : 0, transpose_ ? 0 : tile_.col);
    }
    // The tile as it lies in memory: (C, n) or (n, C).
    Rows rows_of(const Features& f) const {
        return {place(f), transpose_ ? tile_.n : channels_, transpose_ ? channels_ : tile_.n,
                f.row_stride};
    }
    Rows rounded(const Matrix& z) const {
        return round_rows(z.data, z.rows, z.cols, z.row_stride, z_rows_.get());
    }

    // out = Y^T of a tile of features, which as the left side of a product need not be packed.
    void project(const Rows& features, const Matrix& out) const {
        if (transpose_) {
            const Rows left = with_even_cols(features, x_rows_.get());
            return multiply_transposed(left, y_pairs_, out.data, out.row_stride, false);
        }
        const Pairs pairs = pair_rows(features, x_pairs_.get());
        multiply(y_rows_, pairs, out.data, out.row_stride, false);
    }

    // The sides of Y Z as the features lie, that is of Y Z or Z^T Y^T.
    std::pair<Rows, Pairs> bases_and(const Matrix& z) const {
        const Rows z_rows = rounded(z);
        const Pairs left = pair_rows(transpose_ ? z_rows : y_rows_, left_pairs_.get());
        return {transpose(left, left_.get()),
                pair_rows(transpose_ ? y_rows_ : z_rows, z_pairs_.get())};
    }

    template <class Epilogue>
    void multiply_bases(const Matrix& z, Epilogue&& epilogue) const {
        const auto [left, right] = bases_and(z);
        product(left, right, epilogue);
    }

    bool transpose_;
    int64_t channels_, rank_;
    Features features_;
    Buffer<uint16_t> y_;
    Buffer<uint32_t> y_pairs_memory_;
    Buffer<uint16_t> gram_, z_rows_, x_rows_;
    Buffer<uint32_t> z_pairs_, x_pairs_, left_pairs_;
    Buffer<uint16_t> left_, d_rows_;
    Buffer<float> e_, strip_;
    Rows y_rows_{}, gram_rows_{}, x_{};
    Pairs y_pairs_{};
    Tile tile_{};
};

#endif

}  // namespace mfops::cpu::bf16
