// Memory that the kernels work in and return, and how work on it is shared out to threads.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "feature_memory.h"

namespace mfops::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::unique_ptr<float[]> uninitialized(int64_t n);

Tensor as_float(const Tensor& t);

Tensor scalar(double value);

// `empty_features`, in huge pages where the system has them.
Tensor new_features(const Tensor& x, bool batched = true);

// How many items, of so many multiply-adds each, a thread gets at least: with less to do than some
// ten microseconds it is not worth waking.
inline int64_t grain(int64_t multiply_adds) {
    return std::max<int64_t>(1, (1 << 20) / multiply_adds);
}

// Into how many groups to split each of `products` so that all threads have as much to do.
int64_t groups_for_threads(int64_t products);

// As many of `groups` as `extent` rows or columns of X allow: each has a partial sum of a
// factor's gradient or update, and all of them take at most a quarter of X's memory.
int64_t bounded_groups(int64_t groups, int64_t extent, int64_t rank);

// How the rows and columns of each of `products` X' = A B are dealt out to threads backward. Each
// row group has its own partial sum of B's gradient, each column group its own of A's.
struct Groups {
    // What one item of work covers.
    struct Part {
        int64_t product, row_group, col_group;
        int64_t row_begin, row_end, col_begin, col_end;
    };

    Groups(int64_t products, int64_t n_rows, int64_t n_cols, int64_t rank);
    int64_t items() const { return products * rows * cols; }
    Part part(int64_t item) const;

    int64_t products, n_rows, n_cols;
    int64_t rows, cols;  // how many groups of them
};

// 2 g / (B C N), what X - X' is multiplied by for dX; 0 without a gradient of the error.
float error_scale(const std::optional<Tensor>& grad_mse, int64_t elements);

// A factor's gradient in its dtype, of its float partial sums (products * groups, ..): those of a
// product are added in order, over the batch too where the factor is shared. `transpose`: they are
// those of the factor's transpose.
Tensor add_partials(const Tensor& partials, const Tensor& factor, bool transpose);

}  // namespace mfops::cpu
