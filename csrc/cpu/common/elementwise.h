// Loops over tiles or one row of them, in the widest vectors the machine has.
#pragma once

#include <cstdint>

namespace mfops::cpu {

// sum_i (x_i - p_i)^2
double squared_error(const float* x, const float* p, int64_t n);

// With e_i = scale * (x_i - p_i): grad_x_i = e_i, d_i -= e_i
void write_error(const float* x, const float* p, float scale, float* d, float* grad_x, int64_t n);

// d_i -= scale * (x_i - p_i)
void subtract_error(const float* x, const float* p, float scale, float* d, int64_t n);

// out_i += a_i
void add(float* out, const float* a, int64_t n);

// out_i += a_i^2
void add_squares(float* out, const float* a, int64_t n);

double sum(const float* a, int64_t n);
double sum_of_squares(const float* a, int64_t n);

// a_i *= factor, a_i *= b_i
void scale(float* a, float factor, int64_t n);
void multiply_elements(float* a, const float* b, int64_t n);

// a_i = factor / max(sqrt(a_i), floor)
void inverse_root(float* a, float factor, float floor, int64_t n);

// z_i *= numerator_i / (denominator_i + eps)
void multiplicative_update(float* z, const float* numerator, const float* denominator, float eps,
                           int64_t n);

// z_scale_i = z_i / (z_scale_i + eps), z_i = z_scale_i * numerator_i: the same update, with its
// z_scale
void update_with_z_scale(float* z, float* z_scale, const float* numerator, float eps, int64_t n);

// e_i = s (x_i - p_i), p_i = g_i - e_i; g may be null, for zeros
void split_error(const float* x, const float* g, float s, float* p, float* e, int64_t n);

// Each of the columns of a (rows, cols) tile becomes its softmax. A column with a NaN or +inf
// becomes NaN; of weights below 2^-126 nothing is left.
void softmax_columns(float* a, int64_t rows, int64_t cols, int64_t row_stride);

}  // namespace mfops::cpu
