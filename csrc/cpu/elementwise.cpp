#include "elementwise.h"

// One binary holds a clone of each loop per instruction set; the loader picks when it is loaded.
#if defined(__x86_64__) && defined(__GLIBC__)
#define MFOPS_VECTORIZE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MFOPS_VECTORIZE
#endif

namespace mfops::cpu {

MFOPS_VECTORIZE
double squared_error(const float* x, const float* p, int64_t n) {
    // Partial sums by lane: the compiler may not reorder one float sum into a vector itself.
    constexpr int64_t kLanes = 32;
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int64_t j = 0; j < kLanes; ++j) {
            const float e = x[i + j] - p[i + j];
            lanes[j] += e * e;
        }
    }
    double sum = 0;
    for (; i < n; ++i) {
        const double e = x[i] - p[i];
        sum += e * e;
    }
    for (const float lane : lanes) sum += lane;
    return sum;
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

}  // namespace mfops::cpu
