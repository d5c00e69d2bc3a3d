// Products of bfloat16 matrices with float32 sums, by the processor's own instruction (vdpbf16ps).
//
// The instruction multiplies pairs: 16 lanes each add a_0 b_0 + a_1 b_1 to a float. Of a product
// A B the pairs are neighbors along the sum, so A is taken by rows (`Rows`), where they lie side
// by side already, and B with pairs of its rows interleaved (`Pairs`).
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define MFOPS_WITH_BF16 1
// GCC 12 warns of the undefined values that its own intrinsics start from.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
// Of every function that uses the instruction or AVX-512: nothing else runs on other processors.
#ifndef MFOPS_BF16  // tests emulate the instructions
#define MFOPS_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#endif
#endif

namespace mfops::cpu::bf16 {

// Why products of bfloat16 features are made in float32, or "" where `product` makes them: the
// processor has no units for them or MFOPS_CPU_PRODUCTS=float32. Any other value of that than
// float32 and bfloat16 is an error, as is bfloat16 where the processor cannot.
const std::string& unavailable_reason();

#ifdef MFOPS_WITH_BF16

inline bool available() { return unavailable_reason().empty(); }

// n values on a cache line's boundary.
template <class T>
class Buffer {
   public:
    explicit Buffer(int64_t n) : memory_(new(std::align_val_t{64}) T[static_cast<size_t>(n)]) {}
    T* get() const { return memory_.get(); }

   private:
    struct Delete {
        void operator()(T* memory) const { operator delete[](memory, std::align_val_t{64}); }
    };
    std::unique_ptr<T[], Delete> memory_;
};

constexpr int64_t kBlockRows = 6;  // with 4 vectors of columns, 24 of the 32 registers hold sums
constexpr int64_t kBlockVectors = 4;
constexpr int64_t kPanelCols = 16 * kBlockVectors;

inline int64_t even(int64_t n) { return n + n % 2; }

// A matrix whose rows have unit stride. As the left side of a product each row goes on, where its
// length is odd, with a zero.
struct Rows {
    const uint16_t* data;
    int64_t rows, cols, stride;
};

// (2 count, cols), in panels of kPanelCols columns, so that a block's product reads one piece of
// memory: halves 0 and 1 of data[at(p, j)] are elements (2 p, j) and (2 p + 1, j).
struct Pairs {
    const uint32_t* data;
    int64_t count, cols;

    int64_t at(int64_t p, int64_t j) const {
        return j / kPanelCols * kPanelCols * count + p * kPanelCols + j % kPanelCols;
    }
};

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
// values, kPanelCols to a row.
struct Block {
    int64_t row, col, rows;
    __mmask16 mask;
    const float* values;

    MFOPS_BF16 __m512 at(int64_t r, int v) const {
        return _mm512_load_ps(values + r * kPanelCols + 16 * v);
    }
};

// out = the rows that `a` points to times 16 * kVectors columns of b, or out += that; of out there
// are n_rows rows, `stride` apart, and of their vectors the lanes of `mask`.
template <int kVectors, bool kAdd>
MFOPS_BF16 inline __attribute__((always_inline)) void multiply_block(
    const uint16_t* const (&a)[kBlockRows], const uint32_t* b, int64_t pairs, float* out,
    int64_t stride, int64_t n_rows, __mmask16 mask) {
    __m512 sums[kBlockRows][kVectors];
    for (auto& row : sums)
        for (__m512& sum : row) sum = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p) {
        __m512bh columns[kVectors];
        for (int v = 0; v < kVectors; ++v)
            columns[v] = (__m512bh)_mm512_load_si512(b + p * kPanelCols + 16 * v);
        for (int r = 0; r < kBlockRows; ++r) {
            int32_t pair;
            std::memcpy(&pair, a[r] + 2 * p, sizeof pair);
            const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < kVectors; ++v)
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], row, columns[v]);
        }
    }
    for (int r = 0; r < kBlockRows; ++r) {
        for (int v = 0; v < kVectors && r < n_rows; ++v) {
            float* to = out + r * stride + 16 * v;
            if (kAdd) sums[r][v] = _mm512_add_ps(sums[r][v], _mm512_maskz_loadu_ps(mask, to));
            _mm512_mask_storeu_ps(to, mask, sums[r][v]);
        }
    }
}

// The rows of `a` from `row` on; a missing one is the last again, for nobody.
inline void block_rows(const Rows& a, int64_t row, const uint16_t* (&rows)[kBlockRows]) {
    for (int64_t r = 0; r < kBlockRows; ++r)
        rows[r] = a.data + (row + r < a.rows ? row + r : a.rows - 1) * a.stride;
}

// Calls epilogue.take<vectors of a row>(block) for every block of a b while that is in L1, and
// before it epilogue.prefetch(row, col), so that what it reads arrives while the block is computed.
template <class Epilogue>
MFOPS_BF16 void product(const Rows& a, const Pairs& b, Epilogue&& epilogue) {
    alignas(64) float values[kBlockRows * kPanelCols];
    for (int64_t row = 0; row < a.rows; row += kBlockRows) {
        const int64_t n_rows = a.rows - row < kBlockRows ? a.rows - row : kBlockRows;
        const uint16_t* rows[kBlockRows];
        block_rows(a, row, rows);
        int64_t col = 0;
        for (; col + kPanelCols <= b.cols; col += kPanelCols) {
            epilogue.prefetch(row, col);
            multiply_block<kBlockVectors, false>(rows, b.data + b.at(0, col), b.count, values,
                                                 kPanelCols, kBlockRows, 0xffff);
            epilogue.template take<kBlockVectors>(Block{row, col, n_rows, 0xffff, values});
        }
        for (; col < b.cols; col += 16) {
            multiply_block<1, false>(rows, b.data + b.at(0, col), b.count, values, kPanelCols,
                                     kBlockRows, 0xffff);
            epilogue.template take<1>(Block{row, col, n_rows, first_lanes(b.cols - col), values});
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
MFOPS_BF16 void product_by_strips(const Rows& a, const Pairs& b, float* values, const Take& take) {
    for (int64_t row = 0; row < a.rows; row += kBlockRows) {
        const Strip strip{row, a.rows - row < kBlockRows ? a.rows - row : kBlockRows, b.cols,
                          values};
        const uint16_t* rows[kBlockRows];
        block_rows(a, row, rows);
        int64_t col = 0;
        for (; col + kPanelCols <= b.cols; col += kPanelCols)
            multiply_block<kBlockVectors, false>(rows, b.data + b.at(0, col), b.count,
                                                 values + Strip::at(0, col), kPanelCols, kBlockRows,
                                                 0xffff);
        for (; col < b.cols; col += 16)
            multiply_block<1, false>(rows, b.data + b.at(0, col), b.count,
                                     values + Strip::at(0, col), kPanelCols, kBlockRows, 0xffff);
        take(strip);
    }
}

// out = a b or, if `add`, out += a b; out is (a.rows, b.cols).
void multiply(const Rows& a, const Pairs& b, float* out, int64_t stride, bool add);

#endif

}  // namespace mfops::cpu::bf16
