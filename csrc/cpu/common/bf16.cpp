#include "cpu/common/bf16.h"

#include <cstring>

namespace mfops::cpu::bf16 {

#ifdef MFOPS_WITH_BF16

namespace {

// Transposes a 16 x 16 matrix of 32-bit values, a vector a row.
MFOPS_BF16 inline void transpose_block(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    // Row 4 q + c of r: columns c, c + 4, c + 8, c + 12 of rows 4 q to 4 q + 3.
    for (int q = 0; q < 16; q += 4) {
        r[q] = _mm512_unpacklo_epi64(t[q], t[q + 2]);
        r[q + 1] = _mm512_unpackhi_epi64(t[q], t[q + 2]);
        r[q + 2] = _mm512_unpacklo_epi64(t[q + 1], t[q + 3]);
        r[q + 3] = _mm512_unpackhi_epi64(t[q + 1], t[q + 3]);
    }
    for (int c = 0; c < 4; ++c) {
        t[c] = _mm512_shuffle_i32x4(r[c], r[c + 4], 0x88);
        t[c + 4] = _mm512_shuffle_i32x4(r[c], r[c + 4], 0xdd);
        t[c + 8] = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0x88);
        t[c + 12] = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0xdd);
    }
    for (int c = 0; c < 4; ++c) {
        r[c] = _mm512_shuffle_i32x4(t[c], t[c + 8], 0x88);
        r[c + 8] = _mm512_shuffle_i32x4(t[c], t[c + 8], 0xdd);
        r[c + 4] = _mm512_shuffle_i32x4(t[c + 4], t[c + 12], 0x88);
        r[c + 12] = _mm512_shuffle_i32x4(t[c + 4], t[c + 12], 0xdd);
    }
}

// out[p][i] = pair p of a's row i.
MFOPS_BF16 void transpose_pairs(const Rows& a, uint32_t* out, int64_t out_stride) {
    for (int64_t row = 0; row < a.rows; row += 16) {
        const int64_t n_rows = a.rows - row < 16 ? a.rows - row : 16;
        for (int64_t col = 0; col < a.cols; col += 32) {
            const int64_t left = a.cols - col;
            const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
            __m512i block[16];
            for (int i = 0; i < 16; ++i) {
                block[i] = i < n_rows
                               ? _mm512_maskz_loadu_epi16(mask, a.data + (row + i) * a.stride + col)
                               : _mm512_setzero_si512();
            }
            transpose_block(block);
            const int64_t pairs = left >= 32 ? 16 : (left + 1) / 2;
            for (int p = 0; p < 16; ++p) {
                if (p >= pairs) break;
                _mm512_mask_storeu_epi32(out + (col / 2 + p) * out_stride + row,
                                         first_lanes(n_rows), block[p]);
            }
        }
    }
}

// Epilogue of A B: out = A B, or out += A B.
template <bool kAdd>
struct Write {
    float* out;
    int64_t stride;

    template <int kVectors>
    MFOPS_BF16 void take(const Block& block) const {
        for (int64_t r = 0; r < block.rows; ++r) {
            float* to = out + (block.row + r) * stride + block.col;
            for (int v = 0; v < kVectors; ++v, to += 16) {
                __m512 value = block.at(r, v);
                if (kAdd) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(block.mask, to));
                _mm512_mask_storeu_ps(to, block.mask, value);
            }
        }
    }
};

// Likewise of (A B)^T.
template <bool kAdd>
struct WriteTransposed {
    float* out;
    int64_t stride;

    template <int kVectors>
    MFOPS_BF16 void take(const Block& block) const {
        const uint16_t rows = first_lanes(block.rows);
        for (int v = 0; v < kVectors; ++v) {
            __m512i values[16];
            for (int r = 0; r < 16; ++r)
                values[r] = r < block.rows ? (__m512i)block.at(r, v) : _mm512_setzero_si512();
            transpose_block(values);
            float* to = out + (block.col + 16 * v) * stride + block.row;
            for (int c = 0; c < 16; ++c, to += stride) {
                if (!(block.mask >> c & 1)) break;
                __m512 value = (__m512)values[c];
                if (kAdd) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(rows, to));
                _mm512_mask_storeu_ps(to, rows, value);
            }
        }
    }
};

}  // namespace

MFOPS_BF16 Pairs pair_rows(const Rows& a, uint32_t* out) {
    constexpr int64_t kRowsAhead = 8;
    const Pairs pairs{out, (a.rows + 1) / 2, a.cols};
    for (int64_t p = 0; p < pairs.count; ++p) {
        const uint16_t* first = a.data + 2 * p * a.stride;
        const bool has_second = 2 * p + 1 < a.rows;
        for (int64_t j = 0; j < a.cols; j += 16) {
            const __mmask16 mask = first_lanes(a.cols - j);
            // Too short a piece of a row for the processor to see the next one coming.
            __builtin_prefetch(first + kRowsAhead * a.stride + j);
            __builtin_prefetch(first + (kRowsAhead + 1) * a.stride + j);
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first + j));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(
                has_second ? mask : static_cast<__mmask16>(0), first + a.stride + j));
            _mm512_store_si512(out + pairs.at(p, j),
                               _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
    return pairs;
}

Pairs pair_cols(const Rows& a, uint32_t* out) {
    const Pairs pairs{out, (a.cols + 1) / 2, a.rows};
    for (int64_t row = 0; row < a.rows; row += kPanelCols) {
        const int64_t n_rows = a.rows - row < kPanelCols ? a.rows - row : kPanelCols;
        transpose_pairs({a.data + row * a.stride, n_rows, a.cols, a.stride}, out + pairs.at(0, row),
                        kPanelCols);
    }
    return pairs;
}

Rows transpose(const Pairs& b, uint16_t* out) {
    for (int64_t col = 0; col < b.cols; col += kPanelCols) {
        const int64_t n_cols = b.cols - col < kPanelCols ? b.cols - col : kPanelCols;
        const auto* panel = reinterpret_cast<const uint16_t*>(b.data + b.at(0, col));
        transpose_pairs({panel, b.count, 2 * n_cols, 2 * kPanelCols},
                        reinterpret_cast<uint32_t*>(out) + col * b.count, b.count);
    }
    return {out, b.cols, 2 * b.count, 2 * b.count};
}

Rows with_even_cols(const Rows& a, uint16_t* out) {
    if (a.cols % 2 == 0) return a;
    const int64_t cols = even(a.cols);
    for (int64_t r = 0; r < a.rows; ++r) {
        std::memcpy(out + r * cols, a.data + r * a.stride, a.cols * sizeof *out);
        out[r * cols + a.cols] = 0;
    }
    return {out, a.rows, a.cols, cols};
}

MFOPS_BF16 Rows round_rows(const float* a, int64_t rows, int64_t cols, int64_t stride,
                           uint16_t* out) {
    const Rows rounded{out, rows, cols, even(cols)};
    for (int64_t r = 0; r < rows; ++r) {
        uint16_t* row = out + r * rounded.stride;
        for (int64_t j = 0; j < cols; j += 16) {
            const __mmask16 mask = first_lanes(cols - j);
            store(row + j, mask, _mm512_maskz_loadu_ps(mask, a + r * stride + j));
        }
        if (cols % 2) row[cols] = 0;
    }
    return rounded;
}

MFOPS_BF16 void add_squares(float* out, const uint16_t* a, int64_t n) {
    for (int64_t j = 0; j < n; j += 16) {
        const __mmask16 mask = first_lanes(n - j);
        const __m512 value = load(a + j, mask);
        const __m512 sum = _mm512_maskz_loadu_ps(mask, out + j);
        _mm512_mask_storeu_ps(out + j, mask, _mm512_fmadd_ps(value, value, sum));
    }
}

MFOPS_BF16 double sum_of_squares(const uint16_t* a, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < n; j += 16) {
        const __m512 value = load(a + j, first_lanes(n - j));
        sum = _mm512_fmadd_ps(value, value, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

void multiply(const Rows& a, const Pairs& b, float* out, int64_t stride, bool add) {
    if (add) {
        product(a, b, Write<true>{out, stride});
    } else {
        product(a, b, Write<false>{out, stride});
    }
}

void multiply_transposed(const Rows& a, const Pairs& b, float* out, int64_t stride, bool add) {
    if (add) {
        product(a, b, WriteTransposed<true>{out, stride});
    } else {
        product(a, b, WriteTransposed<false>{out, stride});
    }
}

#endif

}  // namespace mfops::cpu::bf16
