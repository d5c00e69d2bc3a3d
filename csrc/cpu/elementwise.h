// Loops over one row of a tile, in the widest vectors the machine has.
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

}  // namespace mfops::cpu
