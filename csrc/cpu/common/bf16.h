// Products of bfloat16 matrices with float32 sums: how operands are packed, and what becomes of a
// product's blocks while they are in a core's L1.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/common/bf16_units.h"

namespace mfops::cpu::bf16 {

#ifdef MFOPS_WITH_BF16

inline bool available() { return units() != Units::kNone; }

// n values on a cache line's boundary.
template <class T>
class Buffer {
   public:
    explicit Buffer(int64_t n) : memory_(new(std::align_val_t{64}) T[static_cast<size_t>(n)]) {
#ifdef MFOPS_BF16_EMULATED  // what nobody wrote is NaN
        std::memset(memory_.get(), 0xff, static_cast<size_t>(n) * sizeof(T));
#endif
    }
    T* get() const { return memory_.get(); }

   private:
    struct Delete {
        void operator()(T* memory) const { operator delete[](memory, std::align_val_t{64}); }
    };
    std::unique_ptr<T[], Delete> memory_;
};

inline int64_t even(int64_t n) { return n + n % 2; }

// How many values the pairs of `rows` rows take.
inline int64_t pairs_size(int64_t rows, int64_t cols) {
    return even(rows) / 2 * ((cols + kPanelCols - 1) / kPanelCols * kPanelCols);
}

// The pairs of a's rows; a missing last row is zeros.
Pairs pair_rows(const Rows& a, uint32_t* out);

// The pairs of a's columns, that is of the rows of its transpose: (even(a.cols), a.rows).
Pairs pair_cols(const Rows& a, uint32_t* out);

// The transpose of b: (b.cols, 2 b.count).
Rows transpose(const Pairs& b, uint16_t* out);

// `a` as the left side of a product: itself where it has an even number of columns, else a copy.
Rows with_even_cols(const Rows& a, uint16_t* out);

// A float matrix with rows of unit stride, rounded, as the left side of a product.
Rows round_rows(const float* a, int64_t rows, int64_t cols, int64_t stride, uint16_t* out);

// out_j += a_j^2 for a row of 16 bits, and sum_j a_j^2.
void add_squares(float* out, const uint16_t* a, int64_t n);
double sum_of_squares(const uint16_t* a, int64_t n);

// 16 values, of which those of the mask exist.
MFOPS_BF16 inline __m512 load(const uint16_t* a, __mmask16 mask) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
MFOPS_BF16 inline void store(uint16_t* a, __mmask16 mask, __m512 values) {
    _mm256_mask_storeu_epi16(a, mask, (__m256i)_mm512_cvtneps_pbh(values));
}
inline uint16_t first_lanes(int64_t n) {
    return n >= 16 ? 0xffff : static_cast<uint16_t>((1u << n) - 1);
}

// A block of a product: its place, its number of rows, which lanes of its vectors exist, and its
// values, kPanelCols to a row of each panel.
struct Block {
    int64_t row, col, rows;
    __mmask16 mask;
    const float* values;

    MFOPS_BF16 __m512 at(int64_t r, int v) const {
        const int panel = v / kBlockVectors;
        return _mm512_load_ps(values + panel * kBlockRows * kPanelCols + r * kPanelCols +
                              16 * (v - panel * kBlockVectors));
    }
};

// Asks for what comes after kVectors vectors of a row of features. That is done in passing, a row
// at a time: each lies on pages of its own, and the processor knows the addresses of few pages.
template <int kVectors, bool kToWrite = false>
MFOPS_BF16 inline void prefetch_next(const uint16_t* row) {
    for (int v = 0; v < kVectors; v += 2) __builtin_prefetch(row + 16 * (kVectors + v), kToWrite);
}

// Calls epilogue.take<vectors of a row>(block) for every block of a b while that is in L1. Blocks
// are several panels wide, so that of every row of features a long piece is read at a time.
template <class Epilogue>
MFOPS_BF16 void product(const Rows& a, const Pairs& b, Epilogue&& epilogue) {
    constexpr int64_t kPanels = 4, kPanelSize = kBlockRows * kPanelCols;
    alignas(64) float values[kPanels * kPanelSize];
    Multiplier multiplier(a, b);
    for (int64_t row = 0; row < a.rows; row += kBlockRows) {
        const int64_t rows = a.rows - row < kBlockRows ? a.rows - row : kBlockRows;
        int64_t col = 0;
        for (; col + kPanels * kPanelCols <= b.cols; col += kPanels * kPanelCols) {
            for (int64_t p = 0; p < kPanels; ++p)
                multiplier.multiply(row, col + p * kPanelCols, values + p * kPanelSize);
            epilogue.template take<kPanels * kBlockVectors>(Block{row, col, rows, 0xffff, values});
        }
        for (; col + kPanelCols <= b.cols; col += kPanelCols) {
            multiplier.multiply(row, col, values);
            epilogue.template take<kBlockVectors>(Block{row, col, rows, 0xffff, values});
        }
        for (; col < b.cols; col += 16) {
            multiplier.multiply(row, col, values);
            epilogue.template take<1>(Block{row, col, rows, first_lanes(b.cols - col), values});
        }
    }
}

// Rows of a product over all of its columns, a piece that stays in a core's L1 and L2.
struct Strip {
    int64_t row, rows, cols;
    const float* values;

    // Where row r, column c of the piece is, in `values` or memory laid out alike.
    static int64_t at(int64_t r, int64_t c) {
        return c / kPanelCols * kPanelCols * kBlockRows + r * kPanelCols + c % kPanelCols;
    }
    static int64_t size(int64_t cols) {
        return kBlockRows * ((cols + kPanelCols - 1) / kPanelCols * kPanelCols);
    }
};

// Calls take(strip) for every strip of a b; `values` has room for one.
template <class Take>
void product_by_strips(const Rows& a, const Pairs& b, float* values, const Take& take) {
    Multiplier multiplier(a, b);
    for (int64_t row = 0; row < a.rows; row += kBlockRows) {
        int64_t col = 0;
        for (; col + kPanelCols <= b.cols; col += kPanelCols)
            multiplier.multiply(row, col, values + Strip::at(0, col));
        for (; col < b.cols; col += 16) multiplier.multiply(row, col, values + Strip::at(0, col));
        const int64_t rows = a.rows - row < kBlockRows ? a.rows - row : kBlockRows;
        take(Strip{row, rows, b.cols, values});
    }
}

// out = a b or, if `add`, out += a b; out is (a.rows, b.cols).
void multiply(const Rows& a, const Pairs& b, float* out, int64_t stride, bool add);

// The same of its transpose: out is (b.cols, a.rows).
void multiply_transposed(const Rows& a, const Pairs& b, float* out, int64_t stride, bool add);

#endif

}  // namespace mfops::cpu::bf16
