// The processor's units that multiply bfloat16 and sum in float32: AMX and AVX512-BF16.
//
// Both multiply pairs of neighbors along the sum: a_0 b_0 + a_1 b_1 is added to a float. Of a
// product A B, A is taken by rows (`Rows`), where the pairs lie side by side already, and B with
// pairs of its rows interleaved (`Pairs`).
#pragma once

#include <cstdint>
#include <string>

#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define MFOPS_WITH_BF16 1
// GCC 12 warns of the undefined values that its own intrinsics start from.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
// Of every function that uses the units or AVX-512: nothing else runs on other processors.
#ifndef MFOPS_BF16_EMULATED  // by tests
#define MFOPS_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define MFOPS_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#endif
#endif

namespace mfops::cpu::bf16 {

// kNone: products of bfloat16 features are made in float32.
enum class Units { kNone, kAvx512, kAmx };

// The best that the processor has, or what MFOPS_CPU_PRODUCTS asks for: float32, avx512_bf16 or
// amx_bf16. Anything else is an error, as are units that are not there.
Units units();

// Why there are none, or "".
const std::string& unavailable_reason();

// "AMX", "AVX512-BF16" or "".
std::string units_name();

#ifdef MFOPS_WITH_BF16

constexpr int64_t kBlockRows = 16;  // of a block of a product: as many as a tile of AMX has
constexpr int64_t kBlockVectors = 4;
constexpr int64_t kPanelCols = 16 * kBlockVectors;

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

// Makes blocks of a product, by this thread until it is destroyed.
class Multiplier {
   public:
    Multiplier(const Rows& a, const Pairs& b) : a_(a), b_(b), amx_(units() == Units::kAmx) {}
    ~Multiplier();
    Multiplier(const Multiplier&) = delete;
    Multiplier& operator=(const Multiplier&) = delete;

    // values[r][c] = (A B)[row + r][col + c], kPanelCols values to a row, for the kBlockRows rows
    // from `row` on that there are and kPanelCols columns or, where B has fewer left, 16 of them.
    void multiply(int64_t row, int64_t col, float* values);

   private:
    const Rows a_;
    const Pairs b_;
    const bool amx_;
    int64_t tile_rows_ = 0;  // that the tiles are set to
};

#endif

}  // namespace mfops::cpu::bf16
