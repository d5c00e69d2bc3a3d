// The products of a tile of X in float32, by torch's own matrix product.
#pragma once

#include <algorithm>

#include "cpu/common/elementwise.h"
#include "cpu/common/matrix.h"
#include "cpu/common/memory.h"
#include "cpu/factorize/rounds.h"

namespace mfops::cpu {

// Features (B, C, N), read and written by tiles of columns. A tile lies as the memory does, with
// rows of unit stride: C x n or, where channels are innermost, n x C.
class Features {
   public:
    Features(const Tensor& x, bool transpose) : transpose_(transpose), batch_(x, transpose) {}

    Matrix read(int64_t image, int64_t col, int64_t n, float* scratch) const {
        return transpose_ ? batch_.read(image, col, n, 0, batch_.cols(), scratch)
                          : batch_.read(image, 0, batch_.rows(), col, n, scratch);
    }
    // Where to compute a tile that `write` then moves to its place.
    Matrix target(int64_t image, int64_t col, int64_t n, float* scratch) const {
        return transpose_ ? batch_.target(image, col, n, 0, batch_.cols(), scratch)
                          : batch_.target(image, 0, batch_.rows(), col, n, scratch);
    }
    void write(const Matrix& tile, int64_t image, int64_t col) const {
        batch_.write(tile, image, transpose_ ? col : 0, transpose_ ? 0 : col);
    }
    Matrix tile(int64_t n, float* memory) const {
        return transpose_ ? packed(memory, n, batch_.cols()) : packed(memory, batch_.rows(), n);
    }
    bool channels_innermost() const { return transpose_; }
    // C x n, whichever way the tile lies.
    Matrix upright(const Matrix& tile) const { return transpose_ ? tile.transposed() : tile; }

   private:
    bool transpose_;
    Batch batch_;
};

class FloatProducts {
   public:
    // 1.5 MiB: the second product of a tile finds most of it in a core's L2. Narrower tiles make
    // slower products, wider ones take memory and gain little.
    static constexpr int64_t kTileElements = 384 * 1024;
    static constexpr int64_t kBackwardTileElements = kTileElements;
    using Output = Features;

    FloatProducts(const Tensor& x, const Sizes& sizes)
        : features_(x, channels_innermost(x)),
          x_memory_(uninitialized(sizes.channels * sizes.tile_cols)),
          upstream_(uninitialized(sizes.channels * sizes.tile_cols)),
          out_(uninitialized(sizes.channels * sizes.tile_cols)),
          error_(uninitialized(sizes.channels * sizes.tile_cols)),
          term_(uninitialized(sizes.rank * std::max(sizes.channels, sizes.rank))) {}

    void set_bases(const Matrix& y, const Matrix& gram) {
        y_ = y;
        gram_ = gram;
    }
    void load(const Tile& t) {
        tile_ = t;
        x_ = features_.read(t.image, t.col, t.n, x_memory_.get());
    }

    void project(const Matrix& out) const { multiply(y_, features_.upright(x_), out); }
    void scale_by_gram(const Matrix& z, const Matrix& out) const { multiply(gram_, z, out); }
    void add_sums(const Matrix& z, const Matrix& sums, bool first) const {
        multiply_add(z, features_.upright(x_).transposed(), sums, first, term_.get());
    }
    void add_weights(const Matrix& z, const Matrix& weights, bool first) const {
        multiply_add(z, z.transposed(), weights, first, term_.get());
    }
    void write_squares(float* squares) const {
        if (features_.channels_innermost()) {
            for (int64_t i = 0; i < tile_.n; ++i)
                squares[i] = static_cast<float>(sum_of_squares(x_.row(i), x_.cols));
        } else {
            std::fill_n(squares, tile_.n, 0.0f);
            for (int64_t c = 0; c < x_.rows; ++c) add_squares(squares, x_.row(c), tile_.n);
        }
    }

    double reconstruct(const Matrix& z, const Output& x_hat) const {
        const Matrix p = x_hat.target(tile_.image, tile_.col, tile_.n, out_.get());
        multiply(y_.transposed(), z, x_hat.upright(p));
        double error = 0;
        for (int64_t r = 0; r < p.rows; ++r) error += squared_error(x_.row(r), p.row(r), p.cols);
        x_hat.write(p, tile_.image, tile_.col);
        return error;
    }

    void project_gradient(const Matrix* z, float s, const Output* upstream,
                          const Matrix& out) const {
        Matrix d;
        if (upstream) d = upstream->read(tile_.image, tile_.col, tile_.n, upstream_.get());
        if (z) {
            const Matrix p = features_.tile(tile_.n, out_.get());
            const Matrix e = features_.tile(tile_.n, error_.get());
            multiply(y_.transposed(), *z, features_.upright(p));
            for (int64_t r = 0; r < p.rows; ++r) {
                split_error(x_.row(r), upstream ? d.row(r) : nullptr, s, p.row(r), e.row(r),
                            p.cols);
            }
            d = p;
        }
        multiply(y_, features_.upright(d), out);
    }

    void write_gradient(const Matrix& v, bool with_error, const Output& grad) const {
        const Matrix result = grad.target(tile_.image, tile_.col, tile_.n, out_.get());
        multiply(y_.transposed(), v, grad.upright(result));
        const Matrix e = features_.tile(tile_.n, error_.get());
        for (int64_t r = 0; with_error && r < result.rows; ++r)
            add(result.row(r), e.row(r), result.cols);
        grad.write(result, tile_.image, tile_.col);
    }

   private:
    Features features_;
    std::unique_ptr<float[]> x_memory_, upstream_, out_, error_, term_;
    Matrix y_, gram_, x_;
    Tile tile_;
};

}  // namespace mfops::cpu
