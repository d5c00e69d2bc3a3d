#include "factorize.h"

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "elementwise.h"
#include "matrix.h"
#include "memory.h"

namespace mfops::cpu {

namespace {

constexpr float kEps = 1e-6f;
constexpr float kShortest = 1e-12f;  // of a column of X, where that is divided by its length

// Columns of X and what is computed from them, 1.5 MiB: the second product of a tile finds most of
// it in a core's L2. Narrower tiles make slower products, wider ones take memory and gain little.
constexpr int64_t kTileElements = 384 * 1024;
constexpr int64_t kMinTileCols = 64;

enum class Method { kEM, kNMF, kVQ, kCD };

Method method_named(const std::string& name) {
    if (name == "em") return Method::kEM;
    if (name == "nmf") return Method::kNMF;
    if (name == "vq") return Method::kVQ;
    STD_TORCH_CHECK(name == "cd", "method: expected em, nmf, vq or cd, got ", name);
    return Method::kCD;
}

Matrix packed(float* memory, int64_t rows, int64_t cols) { return {memory, rows, cols, cols, 1}; }

// A batch of float matrices of its own.
struct Matrices {
    Matrices(int64_t count, int64_t rows, int64_t cols)
        : memory(torch::stable::empty({count, rows, cols}, ScalarType::Float)),
          batch(memory, false) {}
    Matrix operator[](int64_t i) const { return batch.matrix(i); }

    Tensor memory;
    Batch batch;
};

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
    // C x n, whichever way the tile lies.
    Matrix upright(const Matrix& tile) const { return transpose_ ? tile.transposed() : tile; }

   private:
    bool transpose_;
    Batch batch_;
};

struct Sizes {
    Sizes(const Tensor& x, int64_t rank_)
        : batch(x.size(0)), channels(x.size(1)), pixels(x.size(2)), rank(rank_) {
        const int64_t most = kTileElements / (channels + rank);
        // At least as many tiles as keep every thread busy.
        const int64_t wanted =
            std::max(ceil_div(pixels, std::max(most, kMinTileCols)), groups_for_threads(batch));
        tile_cols = std::min(pixels, std::max(kMinTileCols, ceil_div(pixels, wanted)));
        tiles = ceil_div(pixels, tile_cols);
    }

    int64_t batch, channels, pixels, rank;
    int64_t tile_cols, tiles;  // columns of a tile, tiles of an image
};

struct Tile {
    int64_t image, col, n;
};

// Calls f(tile, its number, a scratch of the thread's own made by `Scratch(sizes)`) for every tile.
template <class Scratch, class F>
void for_each_tile(const Sizes& sizes, const F& f) {
    const int64_t work = sizes.channels * sizes.rank * sizes.tile_cols;
    torch::stable::parallel_for(
        0, sizes.batch * sizes.tiles, grain(work), [&](int64_t begin, int64_t end) {
            const Scratch scratch(sizes);
            for (int64_t t = begin; t < end; ++t) {
                const int64_t col = t % sizes.tiles * sizes.tile_cols;
                f(Tile{t / sizes.tiles, col, std::min(sizes.tile_cols, sizes.pixels - col)}, t,
                  scratch);
            }
        });
}

// One thread's memory for the tiles of a round.
struct RoundScratch {
    explicit RoundScratch(const Sizes& s)
        : x(uninitialized(s.channels * s.tile_cols)),
          products(uninitialized(s.rank * s.tile_cols)),
          denominators(uninitialized(s.rank * s.tile_cols)),
          term(uninitialized(s.rank * std::max(s.channels, s.rank))) {}
    std::unique_ptr<float[]> x, products, denominators, term;
};

// Y and Z of every image, and the rounds that find them. Bases are rows here: `y` is Y^T.
class Rounds {
   public:
    // Only vq and cd look at the inverse temperature.
    Rounds(const Tensor& x, const Tensor& y0, const std::string& method, int64_t steps,
           double inverse_temperature = 0)
        : method_(method_named(method)),
          inverse_temperature_(static_cast<float>(inverse_temperature)),
          sizes(x, y0.size(y0.dim() - 1)),
          features(x, channels_innermost(x)),
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

   private:
    Method method_;
    float inverse_temperature_;

   public:
    const Sizes sizes;
    const Features features;
    const Matrices y, z;
    const Matrices gram;  // Y^T Y, of nmf alone

   private:
    bool is_nmf() const { return method_ == Method::kNMF; }
    bool has_cosines() const { return method_ == Method::kVQ || method_ == Method::kCD; }

    // The one pass over X: the next Z and, of each group of columns, Z X^T with Z Z^T or the sums
    // of Z's rows. The groups' shares are added in order, whichever thread computed them.
    void update_coefficients(bool first_round) const {
        const int64_t items = sizes.batch * groups_;
        const int64_t work = 2 * sizes.channels * sizes.rank * ceil_div(sizes.pixels, groups_);
        torch::stable::parallel_for(0, items, grain(work), [&](int64_t begin, int64_t end) {
            const RoundScratch scratch(sizes);
            for (int64_t item = begin; item < end; ++item) {
                const int64_t group = item % groups_;
                const int64_t col_begin = sizes.pixels * group / groups_;
                const int64_t col_end = sizes.pixels * (group + 1) / groups_;
                for (int64_t col = col_begin; col < col_end; col += sizes.tile_cols) {
                    const Tile t{item / groups_, col, std::min(sizes.tile_cols, col_end - col)};
                    const Matrix x = features.read(t.image, col, t.n, scratch.x.get());
                    if (first_round && has_cosines()) write_inverse_lengths(x, t);
                    const Matrix z_tile = z[t.image].block(0, sizes.rank, col, t.n);
                    const Matrix x_tile = features.upright(x);
                    update_tile(x_tile, z_tile, t, first_round, scratch);
                    add_to_sums(x_tile, z_tile, item, col == col_begin, scratch);
                }
            }
        });
    }

    void update_tile(const Matrix& x_tile, const Matrix& z_tile, const Tile& t, bool first_round,
                     const RoundScratch& scratch) const {
        if (!is_nmf()) {
            multiply(y[t.image], x_tile, z_tile);
            if (has_cosines()) {
                const float* factors = inverse_lengths_[t.image].data + t.col;
                for (int64_t k = 0; k < sizes.rank; ++k)
                    multiply_elements(z_tile.row(k), factors, t.n);
            }
            return softmax_columns(z_tile.data, sizes.rank, t.n, z_tile.row_stride);
        }
        const Matrix products = packed(scratch.products.get(), sizes.rank, t.n);
        const Matrix denominators = packed(scratch.denominators.get(), sizes.rank, t.n);
        multiply(y[t.image], x_tile, products);
        if (first_round) {
            for (int64_t k = 0; k < sizes.rank; ++k) {
                std::copy_n(products.row(k), t.n, z_tile.row(k));
            }
            softmax_columns(z_tile.data, sizes.rank, t.n, z_tile.row_stride);
        }
        multiply(gram[t.image], z_tile, denominators);
        for (int64_t k = 0; k < sizes.rank; ++k) {
            multiplicative_update(z_tile.row(k), products.row(k), denominators.row(k), kEps, t.n);
        }
    }

    void add_to_sums(const Matrix& x_tile, const Matrix& z_tile, int64_t item, bool first_tile,
                     const RoundScratch& scratch) const {
        multiply_add(z_tile, x_tile.transposed(), sums_[item], first_tile, scratch.term.get());
        if (is_nmf()) {
            return multiply_add(z_tile, z_tile.transposed(), weights_[item], first_tile,
                                scratch.term.get());
        }
        float* weights = weights_[item].data;
        for (int64_t k = 0; k < sizes.rank; ++k) {
            const float weight = static_cast<float>(sum(z_tile.row(k), z_tile.cols));
            weights[k] = first_tile ? weight : weights[k] + weight;
        }
    }

    // The inverse temperature over the lengths of a tile's columns.
    void write_inverse_lengths(const Matrix& x, const Tile& t) const {
        float* squares = inverse_lengths_[t.image].data + t.col;
        if (features.upright(x).col_stride == 1) {
            std::fill_n(squares, t.n, 0.0f);
            for (int64_t c = 0; c < x.rows; ++c) add_squares(squares, x.row(c), t.n);
        } else {
            for (int64_t i = 0; i < t.n; ++i) {
                squares[i] = static_cast<float>(sum_of_squares(x.row(i), x.cols));
            }
        }
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

    // An image's shares, added up in the first of them.
    Matrix total(const Matrices& shares, int64_t image) const {
        const Matrix first = shares[image * groups_];
        for (int64_t g = 1; g < groups_; ++g) {
            add(first.data, shares[image * groups_ + g].data, first.rows * first.cols);
        }
        return first;
    }

    Matrices inverse_lengths_;
    int64_t groups_;
    Matrices sums_, weights_;
};

struct SolveScratch {
    explicit SolveScratch(const Sizes& s)
        : x(uninitialized(s.channels * s.tile_cols)),
          x_hat(uninitialized(s.channels * s.tile_cols)),
          products(uninitialized(s.rank * s.tile_cols)) {}
    std::unique_ptr<float[]> x, x_hat, products;
};

struct BackwardScratch {
    explicit BackwardScratch(const Sizes& s)
        : x(uninitialized(s.channels * s.tile_cols)),
          g(uninitialized(s.channels * s.tile_cols)),
          p(uninitialized(s.channels * s.tile_cols)),
          e(uninitialized(s.channels * s.tile_cols)),
          z(uninitialized(s.rank * s.tile_cols)),
          w(uninitialized(s.rank * s.tile_cols)),
          v(uninitialized(s.rank * s.tile_cols)) {}
    std::unique_ptr<float[]> x, g, p, e, z, w, v;
};

}  // namespace

std::tuple<Tensor, Tensor> iterate(const Tensor& x, const Tensor& y0, std::string method,
                                   int64_t steps, bool /*tf32*/, double inverse_temperature) {
    const Rounds rounds(x, y0, method, steps, inverse_temperature);
    return {rounds.bases(), torch::stable::to(rounds.z.memory, x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> solve(const Tensor& x, const Tensor& y0,
                                                         std::string method, int64_t steps,
                                                         bool /*tf32*/) {
    STD_TORCH_CHECK(method == "em" || method == "nmf", "method: expected em or nmf, got ", method);
    const bool nmf = method == "nmf";
    const Rounds rounds(x, y0, method, steps);
    const Sizes& sizes = rounds.sizes;
    const Features& features = rounds.features;
    const Matrices slope(nmf ? sizes.batch : 0, sizes.rank, sizes.pixels);
    const bool transpose = channels_innermost(x);
    const Tensor x_hat =
        empty_features({sizes.batch, sizes.channels, sizes.pixels}, x.scalar_type(), transpose);
    const Features out(x_hat, transpose);
    // One entry per tile, added in order, whichever thread computed it.
    std::vector<double> errors(static_cast<size_t>(sizes.batch * sizes.tiles));
    for_each_tile<SolveScratch>(sizes, [&](const Tile& t, int64_t i, const SolveScratch& scratch) {
        const Matrix x_tile = features.read(t.image, t.col, t.n, scratch.x.get());
        const Matrix z_tile = rounds.z[t.image].block(0, sizes.rank, t.col, t.n);
        if (nmf) {
            const Matrix products = packed(scratch.products.get(), sizes.rank, t.n);
            const Matrix slope_tile = slope[t.image].block(0, sizes.rank, t.col, t.n);
            multiply(rounds.y[t.image], features.upright(x_tile), products);
            multiply(rounds.gram[t.image], z_tile, slope_tile);
            for (int64_t k = 0; k < sizes.rank; ++k) {
                update_with_slope(z_tile.row(k), slope_tile.row(k), products.row(k), kEps, t.n);
            }
        }
        const Matrix p = out.target(t.image, t.col, t.n, scratch.x_hat.get());
        multiply(rounds.y[t.image].transposed(), z_tile, out.upright(p));
        double error = 0;
        for (int64_t r = 0; r < p.rows; ++r)
            error += squared_error(x_tile.row(r), p.row(r), p.cols);
        errors[static_cast<size_t>(i)] = error;
        out.write(p, t.image, t.col);
    });
    const double mse = std::accumulate(errors.begin(), errors.end(), 0.0) /
                       static_cast<double>(sizes.batch * sizes.channels * sizes.pixels);
    const Tensor no_slope = torch::stable::empty({0}, x.scalar_type());
    return {rounds.bases(), torch::stable::to(rounds.z.memory, x.scalar_type()),
            nmf ? torch::stable::to(slope.memory, x.scalar_type()) : no_slope, x_hat, scalar(mse)};
}

Tensor nmf_backward(const std::optional<Tensor>& grad_x_hat, const std::optional<Tensor>& grad_mse,
                    const Tensor& x, const Tensor& y, const Tensor& z, const Tensor& slope,
                    bool /*tf32*/) {
    const Sizes sizes(x, y.size(2));
    const bool transpose = channels_innermost(x);
    const Tensor grad_x =
        empty_features({sizes.batch, sizes.channels, sizes.pixels}, x.scalar_type(), transpose);
    const Features features(x, transpose), out(grad_x, transpose);
    const Batch bases(y, false), coefficients(z, false), slopes(slope, false);
    std::optional<Features> upstream;
    if (grad_x_hat) upstream.emplace(*grad_x_hat, transpose);
    float s = 0;
    if (grad_mse) {
        s = static_cast<float>(2.0 * *static_cast<const float*>(grad_mse->data_ptr()) /
                               static_cast<double>(x.numel()));
    }
    for_each_tile<BackwardScratch>(
        sizes, [&](const Tile& t, int64_t, const BackwardScratch& scratch) {
            const Matrix y_image = bases.matrix(t.image);
            const auto read = [&](const Batch& batch, float* memory) {
                return batch.read(t.image, 0, sizes.rank, t.col, t.n, memory);
            };
            const Matrix e = features.tile(t.n, scratch.e.get());
            Matrix d = features.tile(t.n, scratch.p.get());
            if (upstream) d = upstream->read(t.image, t.col, t.n, scratch.g.get());
            if (grad_mse) {
                const Matrix x_tile = features.read(t.image, t.col, t.n, scratch.x.get());
                const Matrix p = features.tile(t.n, scratch.p.get());
                multiply(y_image, read(coefficients, scratch.z.get()), features.upright(p));
                for (int64_t r = 0; r < p.rows; ++r) {
                    split_error(x_tile.row(r), upstream ? d.row(r) : nullptr, s, p.row(r), e.row(r),
                                p.cols);
                }
                d = p;
            }
            const Matrix v = packed(scratch.v.get(), sizes.rank, t.n);
            multiply(y_image.transposed(), features.upright(d), v);
            const Matrix w = read(slopes, scratch.w.get());
            for (int64_t k = 0; k < sizes.rank; ++k) multiply_elements(v.row(k), w.row(k), t.n);
            const Matrix result = out.target(t.image, t.col, t.n, scratch.x.get());
            multiply(y_image, v, features.upright(result));
            for (int64_t r = 0; grad_mse && r < result.rows; ++r) {
                add(result.row(r), e.row(r), result.cols);
            }
            out.write(result, t.image, t.col);
        });
    return grad_x;
}

}  // namespace mfops::cpu
