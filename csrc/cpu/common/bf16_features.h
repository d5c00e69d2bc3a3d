// Features of bfloat16, and what becomes of a product's blocks on the way to them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "cpu/common/bf16.h"
#include "cpu/common/memory.h"

namespace mfops::cpu::bf16 {

#ifdef MFOPS_WITH_BF16

using torch::stable::Tensor;

// Whether features are multiplied in bfloat16: the processor has units for it, and each row, of
// pixels or of channels where those are innermost, lies in one piece, as of the gradient of X'.
inline bool takes(const Tensor& x, const std::optional<Tensor>& grad_x_hat = std::nullopt) {
    const bool transpose = channels_innermost(x);
    const auto in_rows = [&](const Tensor& t) {
        const int64_t d = t.dim() - (transpose ? 2 : 1);
        return t.stride(d) == 1 || t.size(d) == 1;
    };
    return x.scalar_type() == ScalarType::BFloat16 && available() && in_rows(x) &&
           (!grad_x_hat || in_rows(*grad_x_hat));
}

// Features as `batch` matrices with rows of unit stride: pixels innermost (C, N) or, transposed,
// channels (N, C).
struct Features {
    Features(const Tensor& x, bool transpose)
        : data(static_cast<uint16_t*>(x.data_ptr())),
          image_stride(x.dim() == 3 && x.size(0) > 1 ? x.stride(0) : 0),
          row_stride(x.stride(x.dim() - (transpose ? 1 : 2))) {}

    uint16_t* at(int64_t image, int64_t row, int64_t col) const {
        return data + image * image_stride + row * row_stride + col;
    }

    uint16_t* data;
    int64_t image_stride, row_stride;
};

// One thread's memory for a factor's rows or columns at a tile, in the two ways to multiply it.
struct Packed {
    Packed(int64_t n, int64_t rank)
        : pairs(std::max(pairs_size(rank, n), pairs_size(n, rank))), rows(even(n) * even(rank)) {}

    // (n, rank) as the left side of a product, and its transpose as the right side.
    Rows left(const Rows& a, bool transposed) const {
        return transposed ? transpose(pair_rows(a, pairs.get()), rows.get())
                          : with_even_cols(a, rows.get());
    }
    Pairs right(const Rows& a, bool transposed) const {
        return transposed ? pair_cols(a, pairs.get()) : pair_rows(a, pairs.get());
    }

    Buffer<uint32_t> pairs;
    Buffer<uint16_t> rows;
};

// Epilogue of A B: X' in bfloat16 where there is a place for it, and the error of all images.
struct Reconstruct {
    const uint16_t* x;
    int64_t x_stride, image_stride, images;
    uint16_t* x_hat;
    int64_t x_hat_stride;
    double error;

    template <int kVectors>
    MFOPS_BF16 void take(const Block& block) {
        __m512 sums[kVectors];
        for (__m512& sum : sums) sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < images; ++i) {
            const uint16_t* image = x + i * image_stride + block.row * x_stride + block.col;
            for (int64_t r = 0; r < block.rows; ++r, image += x_stride) {
                prefetch_next<kVectors>(image);
                for (int v = 0; v < kVectors; ++v) {
                    const __m512 value = load(image + 16 * v, block.mask);
                    const __m512 error = _mm512_maskz_sub_ps(block.mask, value, block.at(r, v));
                    sums[v] = _mm512_fmadd_ps(error, error, sums[v]);
                }
            }
        }
        for (const __m512& sum : sums) error += _mm512_reduce_add_ps(sum);
        if (!x_hat) return;
        for (int64_t r = 0; r < block.rows; ++r) {
            uint16_t* row = x_hat + (block.row + r) * x_hat_stride + block.col;
            prefetch_next<kVectors, true>(row);
            for (int v = 0; v < kVectors; ++v) store(row + 16 * v, block.mask, block.at(r, v));
        }
    }
};

// Epilogue of A B backward: writes dX or E and, of the sum over images D = G' - s (X - X'), its
// rows and the pairs of its rows.
template <bool kError>
struct Backward {
    const uint16_t* x;
    int64_t x_stride, x_image_stride;
    const uint16_t* g;  // G', where there is one; of every image, or already summed
    int64_t g_stride, g_image_stride, g_images;
    uint16_t* grad_x;  // where it is wanted
    int64_t grad_x_stride, grad_x_image_stride;
    float* e;  // likewise s (X - X') of a single image, not rounded
    int64_t e_stride;
    int64_t images;
    float scale;
    uint16_t* d_rows;  // the left side of a product, rows of even length
    int64_t d_rows_stride;
    uint32_t* d_pairs_data;
    Pairs d_pairs;  // which they are

    float* d;  // room for a strip; of a single image that of the product's values

    // Image by image and row by row, as the features lie in memory.
    MFOPS_BF16 void operator()(const Strip& strip) const {
        for (int64_t i = 0; i < images; ++i) {
            for (int64_t r = 0; r < strip.rows; ++r) {
                if (i == 0) {
                    add_row<true>(strip, i, r);
                } else {
                    add_row<false>(strip, i, r);
                }
            }
        }
        if (strip.cols % 2) {  // rows of D go on with a zero
            for (int64_t r = 0; r < strip.rows; ++r)
                d_rows[(strip.row + r) * d_rows_stride + strip.cols] = 0;
        }
        for (int64_t r = 0; r < strip.rows; r += 2) {
            for (int64_t c = 0; c < strip.cols; c += 16) {
                const float* first = d + Strip::at(r, c);
                write_pairs(strip.row + r, c, first_lanes(strip.cols - c), _mm512_load_ps(first),
                            r + 1 < strip.rows ? first + kPanelCols : nullptr);
            }
        }
    }

    // A row of an image's dX, and what it is of D.
    template <bool kFirst>
    MFOPS_BF16 void add_row(const Strip& strip, int64_t i, int64_t r) const {
        const int64_t row = strip.row + r;
        const uint16_t* x_row = x + i * x_image_stride + row * x_stride;
        const uint16_t* g_row = i < g_images ? g + i * g_image_stride + row * g_stride : nullptr;
        uint16_t* to = grad_x ? grad_x + i * grad_x_image_stride + row * grad_x_stride : nullptr;
        float* e_row = e ? e + row * e_stride : nullptr;
        const __m512 s = _mm512_set1_ps(scale);
        const auto add = [=](int64_t c, const float* p, float* sum,
                             __mmask16 mask) __attribute__((always_inline)) MFOPS_BF16 {
            __m512 value = kFirst ? _mm512_setzero_ps() : _mm512_load_ps(sum);
            if (g_row) value = _mm512_add_ps(value, load(g_row + c, mask));
            if (kError) {
                const __m512 error =
                    _mm512_mul_ps(s, _mm512_sub_ps(load(x_row + c, mask), _mm512_load_ps(p)));
                if (to) store(to + c, mask, error);
                if (e_row) _mm512_mask_storeu_ps(e_row + c, mask, error);
                value = _mm512_sub_ps(value, error);
            }
            _mm512_store_ps(sum, value);
        };
        const float* p = strip.values + r * kPanelCols;
        float* sum = d + r * kPanelCols;
        int64_t c = 0;
        for (; c + kPanelCols <= strip.cols; c += kPanelCols) {
            for (int v = 0; v < kPanelCols; v += 32) {  // the next row lies on other pages
                __builtin_prefetch(x_row + x_stride + c + v);
                if (g_row) __builtin_prefetch(g_row + g_stride + c + v);
                if (to) __builtin_prefetch(to + grad_x_stride + c + v, 1);
            }
            for (int v = 0; v < kPanelCols; v += 16) add(c + v, p + v, sum + v, 0xffff);
            p += kBlockRows * kPanelCols;
            sum += kBlockRows * kPanelCols;
        }
        for (; c < strip.cols; c += 16, p += 16, sum += 16)
            add(c, p, sum, first_lanes(strip.cols - c));
    }

    // 16 columns of two rows of D; a missing second row is zeros.
    MFOPS_BF16 void write_pairs(int64_t row, int64_t col, __mmask16 mask, __m512 first,
                                const float* second) const {
        uint16_t* to = d_rows + row * d_rows_stride + col;
        const __m256i low = (__m256i)_mm512_cvtneps_pbh(first);
        _mm256_mask_storeu_epi16(to, mask, low);
        __m512i pairs = _mm512_cvtepu16_epi32(low);
        if (second) {
            const __m256i high = (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(second));
            _mm256_mask_storeu_epi16(to + d_rows_stride, mask, high);
            pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        }
        _mm512_mask_storeu_epi32(d_pairs_data + d_pairs.at(row / 2, col), mask, pairs);
    }
};

// Epilogue of A B: out = A B, or A B + E where that is given.
struct AddError {
    const float* e;
    int64_t e_stride;
    uint16_t* out;
    int64_t out_stride;

    template <int kVectors>
    MFOPS_BF16 void take(const Block& block) const {
        for (int64_t r = 0; r < block.rows; ++r) {
            const float* from = e + (block.row + r) * e_stride + block.col;
            uint16_t* to = out + (block.row + r) * out_stride + block.col;
            prefetch_next<kVectors, true>(to);
            for (int v = 0; v < kVectors; ++v) {
                __m512 value = block.at(r, v);
                if (e) {
                    const __m512 error = _mm512_maskz_loadu_ps(block.mask, from + 16 * v);
                    value = _mm512_add_ps(value, error);
                }
                store(to + 16 * v, block.mask, value);
            }
        }
    }
};

#endif

}  // namespace mfops::cpu::bf16
