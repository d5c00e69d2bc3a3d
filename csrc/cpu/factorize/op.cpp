#include "cpu/factorize/op.h"

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <numeric>
#include <vector>

#include "cpu/common/elementwise.h"
#include "cpu/common/matrix.h"
#include "cpu/common/memory.h"
#include "cpu/factorize/bf16_products.h"
#include "cpu/factorize/float_products.h"
#include "cpu/factorize/rounds.h"

namespace mfops::cpu {

namespace {

template <class Products>
std::tuple<Tensor, Tensor> factorize_by(const Tensor& x, const Tensor& y0,
                                        const std::string& method, int64_t steps,
                                        double inverse_temperature) {
    const Rounds<Products> rounds(x, y0, method, steps, inverse_temperature);
    return {rounds.bases(), torch::stable::to(rounds.z.memory, x.scalar_type())};
}

template <class Products>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> factorize_reconstruct_by(
    const Tensor& x, const Tensor& y0, const std::string& method, int64_t steps) {
    const bool nmf = method == "nmf";
    const Rounds<Products> rounds(x, y0, method, steps);
    const Sizes& sizes = rounds.sizes;
    const Matrices z_scale(nmf ? sizes.batch : 0, sizes.rank, sizes.pixels);
    const Tensor x_hat = new_features(x);
    const typename Products::Output out(x_hat, channels_innermost(x));
    // One entry per tile, added in order, whichever thread computed it.
    std::vector<double> errors(static_cast<size_t>(sizes.batch * sizes.tiles));
    for_each_tile<Products>(x, sizes, [&](const Tile& t, int64_t i, Products& products) {
        rounds.set_bases(products, t.image);
        products.load(t);
        const Matrix z_tile = rounds.z[t.image].block(0, sizes.rank, t.col, t.n);
        if (nmf) {
            const auto memory = uninitialized(sizes.rank * t.n);
            const Matrix numerators = packed(memory.get(), sizes.rank, t.n);
            const Matrix z_scale_tile = z_scale[t.image].block(0, sizes.rank, t.col, t.n);
            products.project(numerators);
            products.scale_by_gram(z_tile, z_scale_tile);
            for (int64_t k = 0; k < sizes.rank; ++k) {
                update_with_z_scale(z_tile.row(k), z_scale_tile.row(k), numerators.row(k), kEps,
                                    t.n);
            }
        }
        errors[static_cast<size_t>(i)] = products.reconstruct(z_tile, out);
    });
    const double mse = std::accumulate(errors.begin(), errors.end(), 0.0) /
                       static_cast<double>(sizes.batch * sizes.channels * sizes.pixels);
    const Tensor no_z_scale = torch::stable::empty({0}, x.scalar_type());
    return {rounds.bases(), torch::stable::to(rounds.z.memory, x.scalar_type()),
            nmf ? torch::stable::to(z_scale.memory, x.scalar_type()) : no_z_scale, x_hat,
            scalar(mse)};
}

template <class Products>
Tensor nmf_backward_by(const std::optional<Tensor>& grad_x_hat,
                       const std::optional<Tensor>& grad_mse, const Tensor& x, const Tensor& y,
                       const Tensor& z, const Tensor& z_scale) {
    const Sizes sizes(x, y.size(2), Products::kBackwardTileElements);
    const bool transpose = channels_innermost(x);
    Tensor grad_x = new_features(x);
    if (!grad_x_hat && !grad_mse) return torch::stable::zero_(grad_x);
    const typename Products::Output out(grad_x, transpose);
    const Matrices bases(sizes.batch, sizes.rank, sizes.channels);
    Tensor rows = bases.memory;
    torch::stable::copy_(rows, torch::stable::transpose(y, 1, 2));
    const Batch coefficients(z, false), z_scales(z_scale, false);
    std::optional<typename Products::Output> upstream;
    if (grad_x_hat) upstream.emplace(*grad_x_hat, transpose);
    const float s = error_scale(grad_mse, x.numel());
    for_each_tile<Products>(x, sizes, [&](const Tile& t, int64_t, Products& products) {
        products.set_bases(bases[t.image], Matrix{});
        products.load(t);
        const auto z_memory = uninitialized(sizes.rank * t.n);
        const auto w_memory = uninitialized(sizes.rank * t.n);
        const auto v_memory = uninitialized(sizes.rank * t.n);
        const auto read = [&](const Batch& batch, float* memory) {
            return batch.read(t.image, 0, sizes.rank, t.col, t.n, memory);
        };
        const Matrix z_tile = grad_mse ? read(coefficients, z_memory.get()) : Matrix{};
        const Matrix* z_given = grad_mse ? &z_tile : nullptr;
        const Matrix v = packed(v_memory.get(), sizes.rank, t.n);
        products.project_gradient(z_given, s, upstream ? &*upstream : nullptr, v);
        const Matrix w = read(z_scales, w_memory.get());
        for (int64_t k = 0; k < sizes.rank; ++k) multiply_elements(v.row(k), w.row(k), t.n);
        products.write_gradient(v, grad_mse.has_value(), out);
    });
    return grad_x;
}

}  // namespace

std::tuple<Tensor, Tensor> factorize(const Tensor& x, const Tensor& y0, std::string method,
                                     int64_t steps, bool /*tf32*/, double inverse_temperature) {
#ifdef MFOPS_WITH_BF16
    if (bf16::takes(x)) {
        return factorize_by<bf16::Products>(x, y0, method, steps, inverse_temperature);
    }
#endif
    return factorize_by<FloatProducts>(x, y0, method, steps, inverse_temperature);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> factorize_reconstruct(
    const Tensor& x, const Tensor& y0, std::string method, int64_t steps, bool /*tf32*/) {
    STD_TORCH_CHECK(method == "em" || method == "nmf", "method: expected em or nmf, got ", method);
#ifdef MFOPS_WITH_BF16
    if (bf16::takes(x)) return factorize_reconstruct_by<bf16::Products>(x, y0, method, steps);
#endif
    return factorize_reconstruct_by<FloatProducts>(x, y0, method, steps);
}

Tensor nmf_backward(const std::optional<Tensor>& grad_x_hat, const std::optional<Tensor>& grad_mse,
                    const Tensor& x, const Tensor& y, const Tensor& z, const Tensor& z_scale,
                    bool /*tf32*/) {
#ifdef MFOPS_WITH_BF16
    if (bf16::takes(x, grad_x_hat)) {
        return nmf_backward_by<bf16::Products>(grad_x_hat, grad_mse, x, y, z, z_scale);
    }
#endif
    return nmf_backward_by<FloatProducts>(grad_x_hat, grad_mse, x, y, z, z_scale);
}

}  // namespace mfops::cpu
