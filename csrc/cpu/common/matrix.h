// Matrices that live in somebody else's memory: strided views, tiles of them, their product.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace mfops::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A float matrix view.
struct Matrix {
    float* data;
    int64_t rows, cols;
    int64_t row_stride, col_stride;

    Matrix block(int64_t row, int64_t n_rows, int64_t col, int64_t n_cols) const {
        return {data + row * row_stride + col * col_stride, n_rows, n_cols, row_stride, col_stride};
    }
    Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }
    float* row(int64_t r) const { return data + r * row_stride; }
};

// out = a b, through torch's own matrix product. Runs on the calling thread inside parallel_for.
void multiply(const Matrix& a, const Matrix& b, const Matrix& out);

// out = a b the first time, out += a b after that. `scratch` has room for `out`.
void multiply_add(const Matrix& a, const Matrix& b, const Matrix& out, bool first, float* scratch);

// A batch of matrices (batch, rows, cols) of any dtype and strides, read and written by tiles. A
// tensor of two dimensions is the same matrix for every b. `transpose` swaps rows and columns.
class Batch {
   public:
    Batch(const Tensor& tensor, bool transpose);

    int64_t rows() const { return rows_; }
    int64_t cols() const { return cols_; }

    // The tile as floats with rows of unit stride: in place where the memory is that already, else
    // a copy in `scratch` (n_rows * n_cols floats).
    Matrix read(int64_t b, int64_t row, int64_t n_rows, int64_t col, int64_t n_cols,
                float* scratch) const;

    // Where to compute a tile that goes to this batch: in place or `scratch`, as for `read`.
    Matrix target(int64_t b, int64_t row, int64_t n_rows, int64_t col, int64_t n_cols,
                  float* scratch) const;
    // Moves a computed `target` to its place if it is not there already.
    void write(const Matrix& computed, int64_t b, int64_t row, int64_t col) const;

    // Matrix b of a float batch, with whatever strides it has.
    Matrix matrix(int64_t b) const;

   private:
    bool in_place() const { return dtype_ == ScalarType::Float && col_stride_ == 1; }
    char* address(int64_t b, int64_t row, int64_t col) const;
    Tensor tile(int64_t b, int64_t row, int64_t n_rows, int64_t col, int64_t n_cols) const;

    char* base_;
    ScalarType dtype_;
    int64_t element_size_;
    int64_t rows_, cols_;
    int64_t batch_stride_, row_stride_, col_stride_;
};

}  // namespace mfops::cpu
