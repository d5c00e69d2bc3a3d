#include "cpu/common/memory.h"

#ifdef __linux__
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <utility>

namespace mfops::cpu {

namespace {

// Large outputs are mapped afresh at every call, and taking the page faults 4 KiB at a time costs
// more than computing them. Asks for huge pages where the system grants them on request.
void advise_huge_pages(const Tensor& t) {
#ifdef __linux__
    constexpr uintptr_t kHugePage = 2 << 20;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
    const uintptr_t end = begin + static_cast<uintptr_t>(t.numel()) * t.element_size();
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = end / kHugePage * kHugePage;
    // A hint: where it is refused, nothing is lost.
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

std::unique_ptr<float[]> uninitialized(int64_t n) {
    return std::unique_ptr<float[]>(new float[static_cast<size_t>(n)]);
}

Tensor as_float(const Tensor& t) {
    return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

Tensor scalar(double value) {
    Tensor t = torch::stable::empty({}, ScalarType::Float);
    *static_cast<float*>(t.data_ptr()) = static_cast<float>(value);
    return t;
}

Tensor new_features(const Tensor& x, bool batched) {
    const Tensor features = empty_features(x, batched);
    advise_huge_pages(features);
    return features;
}

int64_t groups_for_threads(int64_t products) {
    const int64_t threads = torch::stable::get_num_threads();
    return threads / std::gcd(threads, products);
}

int64_t bounded_groups(int64_t groups, int64_t extent, int64_t rank) {
    return std::clamp<int64_t>(groups, 1, std::max<int64_t>(1, extent / (4 * rank)));
}

Groups::Groups(int64_t products_, int64_t n_rows_, int64_t n_cols_, int64_t rank)
    : products(products_), n_rows(n_rows_), n_cols(n_cols_) {
    const int64_t wanted = groups_for_threads(products);
    // Rows first: threads that share rows share memory pages, and X's gradient is new memory.
    rows = bounded_groups(wanted, n_rows, rank);
    cols = bounded_groups(ceil_div(wanted, rows), n_cols, rank);
}

Groups::Part Groups::part(int64_t item) const {
    const int64_t row = item / cols % rows, col = item % cols;
    return {.product = item / (rows * cols),
            .row_group = row,
            .col_group = col,
            .row_begin = n_rows * row / rows,
            .row_end = n_rows * (row + 1) / rows,
            .col_begin = n_cols * col / cols,
            .col_end = n_cols * (col + 1) / cols};
}

float error_scale(const std::optional<Tensor>& grad_mse, int64_t elements) {
    if (!grad_mse) return 0;
    return static_cast<float>(2.0 * *static_cast<const float*>(grad_mse->data_ptr()) /
                              static_cast<double>(elements));
}

Tensor add_partials(const Tensor& partials, const Tensor& factor, bool transpose) {
    const int64_t images = factor.dim() == 3 ? factor.size(0) : 1;
    const int64_t count = partials.size(0) / images;
    const Tensor by_factor =
        torch::stable::view(partials, {images, count, partials.size(1), partials.size(2)});
    const std::vector<int64_t> dims{1};
    Tensor sum = count == 1 ? by_factor : torch::stable::sum(by_factor, dims);
    if (transpose) sum = torch::stable::contiguous(torch::stable::transpose(sum, -1, -2));
    const Tensor shaped = torch::stable::reshape(sum, factor.sizes());
    return torch::stable::to(shaped, factor.scalar_type());
}

}  // namespace mfops::cpu
