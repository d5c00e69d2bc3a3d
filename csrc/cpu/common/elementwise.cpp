#include "cpu/common/elementwise.h"

#include <algorithm>
#include <bit>
#include <cmath>

// One binary holds a clone of each loop per instruction set; the loader picks when it is loaded.
#if defined(__x86_64__) && defined(__GLIBC__)
#define MFOPS_VECTORIZE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MFOPS_VECTORIZE
#endif

namespace mfops::cpu {

namespace {

// Partial sums by lane: the compiler may not reorder one float sum into a vector itself.
constexpr int64_t kLanes = 32;

// Goes into each clone of the loops that call it.
#define MFOPS_INLINE inline __attribute__((always_inline))

// sum_i term(i)
template <class Term>
MFOPS_INLINE double lane_sum(int64_t n, Term term) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] += term(i + j);
    }
    double sum = 0;
    for (; i < n; ++i) sum += term(i);
    for (const float lane : lanes) sum += lane;
    return sum;
}

// e^x for x <= 0 to about 1 ulp; 0 where that is below 2^-126, NaN for NaN.
MFOPS_INLINE float exp_of_nonpositive(float x) {
    // x = n ln 2 + r with |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer, which then is
    // in the lowest bits.
    constexpr float kRounder = 12582912.0f;
    const float shifted = x * 1.44269504f + kRounder;
    const float n = shifted - kRounder;
    // ln 2 in two parts: n times the first is exact.
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
    return x < -87.33f ? 0.0f : p * power;
}

MFOPS_INLINE void softmax_strip(float* a, int64_t rows, int64_t cols, int64_t row_stride,
                                float* largest, float* total) {
    for (int64_t j = 0; j < cols; ++j) {
        largest[j] = a[j];
        total[j] = 0;
    }
    for (int64_t r = 1; r < rows; ++r) {
        const float* row = a + r * row_stride;
        for (int64_t j = 0; j < cols; ++j) largest[j] = row[j] > largest[j] ? row[j] : largest[j];
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* row = a + r * row_stride;
        for (int64_t j = 0; j < cols; ++j) {
            row[j] = exp_of_nonpositive(row[j] - largest[j]);
            total[j] += row[j];
        }
    }
    for (int64_t j = 0; j < cols; ++j) total[j] = 1.0f / total[j];
    for (int64_t r = 0; r < rows; ++r) {
        float* row = a + r * row_stride;
        for (int64_t j = 0; j < cols; ++j) row[j] *= total[j];
    }
}

}  // namespace

MFOPS_VECTORIZE
double squared_error(const float* x, const float* p, int64_t n) {
    return lane_sum(
        n, [=](int64_t i) __attribute__((always_inline)) { return (x[i] - p[i]) * (x[i] - p[i]); });
}

MFOPS_VECTORIZE
void write_error(const float* x, const float* p, float scale, float* d, float* grad_x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const float e = scale * (x[i] - p[i]);
        grad_x[i] = e;
        d[i] -= e;
    }
}

MFOPS_VECTORIZE
void subtract_error(const float* x, const float* p, float scale, float* d, int64_t n) {
    for (int64_t i = 0; i < n; ++i) d[i] -= scale * (x[i] - p[i]);
}

MFOPS_VECTORIZE
void add(float* out, const float* a, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] += a[i];
}

MFOPS_VECTORIZE
void add_squares(float* out, const float* a, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] += a[i] * a[i];
}

MFOPS_VECTORIZE
double sum(const float* a, int64_t n) {
    return lane_sum(n, [=](int64_t i) __attribute__((always_inline)) { return a[i]; });
}

MFOPS_VECTORIZE
double sum_of_squares(const float* a, int64_t n) {
    return lane_sum(n, [=](int64_t i) __attribute__((always_inline)) { return a[i] * a[i]; });
}

MFOPS_VECTORIZE
void scale(float* a, float factor, int64_t n) {
    for (int64_t i = 0; i < n; ++i) a[i] *= factor;
}

MFOPS_VECTORIZE
void multiply_elements(float* a, const float* b, int64_t n) {
    for (int64_t i = 0; i < n; ++i) a[i] *= b[i];
}

MFOPS_VECTORIZE
void inverse_root(float* a, float factor, float floor, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const float root = std::sqrt(a[i]);
        a[i] = factor / (root < floor ? floor : root);  // NaN stays
    }
}

MFOPS_VECTORIZE
void multiplicative_update(float* z, const float* numerator, const float* denominator, float eps,
                           int64_t n) {
    for (int64_t i = 0; i < n; ++i) z[i] = z[i] * numerator[i] / (denominator[i] + eps);
}

MFOPS_VECTORIZE
void update_with_z_scale(float* z, float* z_scale, const float* numerator, float eps, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        z_scale[i] = z[i] / (z_scale[i] + eps);
        z[i] = z_scale[i] * numerator[i];
    }
}

MFOPS_VECTORIZE
void split_error(const float* x, const float* g, float s, float* p, float* e, int64_t n) {
    for (int64_t i = 0; i < n; ++i) e[i] = s * (x[i] - p[i]);
    if (g) {
        for (int64_t i = 0; i < n; ++i) p[i] = g[i] - e[i];
    } else {
        for (int64_t i = 0; i < n; ++i) p[i] = -e[i];
    }
}

MFOPS_VECTORIZE
void softmax_columns(float* a, int64_t rows, int64_t cols, int64_t row_stride) {
    constexpr int64_t kStrip = 64;  // columns that stay in L1 from the first look to the last
    float largest[kStrip], total[kStrip];
    int64_t col = 0;
    for (; col + kStrip <= cols; col += kStrip) {
        softmax_strip(a + col, rows, kStrip, row_stride, largest, total);
    }
    softmax_strip(a + col, rows, cols - col, row_stride, largest, total);
}

}  // namespace mfops::cpu
