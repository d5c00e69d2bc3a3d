#include "cpu/common/matrix.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <utility>

#include "cpu/common/elementwise.h"

namespace mfops::cpu {

namespace {

Tensor view_of(void* data, ScalarType dtype, int64_t rows, int64_t cols, int64_t row_stride,
               int64_t col_stride) {
    return torch::stable::from_blob(data, {rows, cols}, {row_stride, col_stride},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    dtype);
}

Tensor view_of(const Matrix& m) {
    return view_of(m.data, ScalarType::Float, m.rows, m.cols, m.row_stride, m.col_stride);
}

}  // namespace

void multiply(const Matrix& a, const Matrix& b, const Matrix& out) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(view_of(a)),
                                      torch::stable::detail::from(view_of(b)),
                                      torch::stable::detail::from(view_of(out))};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned handle, to release it
}

void multiply_add(const Matrix& a, const Matrix& b, const Matrix& out, bool first, float* scratch) {
    if (first) return multiply(a, b, out);
    if (out.col_stride != 1) {
        return multiply_add(b.transposed(), a.transposed(), out.transposed(), first, scratch);
    }
    const Matrix term{scratch, out.rows, out.cols, out.cols, 1};
    multiply(a, b, term);
    for (int64_t r = 0; r < out.rows; ++r) add(out.row(r), term.row(r), out.cols);
}

Batch::Batch(const Tensor& tensor, bool transpose)
    : base_(static_cast<char*>(tensor.data_ptr())),
      dtype_(tensor.scalar_type()),
      element_size_(static_cast<int64_t>(tensor.element_size())),
      batch_stride_(tensor.dim() == 3 && tensor.size(0) > 1 ? tensor.stride(0) : 0) {
    const int64_t d = tensor.dim() - 2;
    rows_ = tensor.size(d);
    cols_ = tensor.size(d + 1);
    row_stride_ = tensor.stride(d);
    col_stride_ = tensor.stride(d + 1);
    if (transpose) {
        std::swap(rows_, cols_);
        std::swap(row_stride_, col_stride_);
    }
}

char* Batch::address(int64_t b, int64_t row, int64_t col) const {
    return base_ + (b * batch_stride_ + row * row_stride_ + col * col_stride_) * element_size_;
}

Tensor Batch::tile(int64_t b, int64_t row, int64_t n_rows, int64_t col, int64_t n_cols) const {
    return view_of(address(b, row, col), dtype_, n_rows, n_cols, row_stride_, col_stride_);
}

Matrix Batch::target(int64_t b, int64_t row, int64_t n_rows, int64_t col, int64_t n_cols,
                     float* scratch) const {
    if (in_place()) {
        return {reinterpret_cast<float*>(address(b, row, col)), n_rows, n_cols, row_stride_, 1};
    }
    return {scratch, n_rows, n_cols, n_cols, 1};
}

Matrix Batch::read(int64_t b, int64_t row, int64_t n_rows, int64_t col, int64_t n_cols,
                   float* scratch) const {
    const Matrix m = target(b, row, n_rows, col, n_cols, scratch);
    if (!in_place()) {
        Tensor copy = view_of(m);
        torch::stable::copy_(copy, tile(b, row, n_rows, col, n_cols));
    }
    return m;
}

void Batch::write(const Matrix& computed, int64_t b, int64_t row, int64_t col) const {
    if (in_place()) return;
    Tensor out = tile(b, row, computed.rows, col, computed.cols);
    torch::stable::copy_(out, view_of(computed));
}

Matrix Batch::matrix(int64_t b) const {
    return {reinterpret_cast<float*>(address(b, 0, 0)), rows_, cols_, row_stride_, col_stride_};
}

}  // namespace mfops::cpu
