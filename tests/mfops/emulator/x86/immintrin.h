// The AVX-512 and AMX that csrc/cpu uses, for processors without them: by vectors of the compiler
// and loops.
//
// The build finds this file in place of the compiler's (package_with_bfloat16). Masked lanes
// are neither read nor written, an aligned access is checked to be so, and products of bfloat16 are
// summed as Intel's manual says of VDPBF16PS (the odd one is added first) and TDPBF16PS (odd and
// even ones have sums of their own): each sum is rounded (here from double) to nearest, subnormal
// numbers are zeros. The tiles are checked as the processor does. What this cannot see: time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>

#define MFOPS_BF16_EMULATED
#define MFOPS_BF16  // no function needs a processor of its own
#define MFOPS_AMX
#define __builtin_cpu_supports(feature) true

// As the compiler's, they may alias anything.
typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef short __m512bh __attribute__((vector_size(64), may_alias));
typedef long long __m256i __attribute__((vector_size(32), may_alias));
typedef short __m256bh __attribute__((vector_size(32), may_alias));
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

namespace avx512 {

template <class To, class From>
To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class Lane>
struct Lanes64 {
    Lane at[64 / sizeof(Lane)];
};
template <class Lane>
struct Lanes32 {
    Lane at[32 / sizeof(Lane)];
};
using Words = Lanes64<uint32_t>;
using Floats = Lanes64<float>;

inline void check_aligned(const void* memory) {
    if (reinterpret_cast<uintptr_t>(memory) % 64 == 0) return;
    std::fputs("avx512: an aligned access to memory that is not\n", stderr);
    std::abort();
}

// The lanes of `mask`, from memory or zeros.
template <class Lanes>
Lanes masked_load(uint32_t mask, const void* memory) {
    Lanes lanes{};
    for (size_t i = 0; i < std::size(lanes.at); ++i)
        if (mask >> i & 1)
            std::memcpy(&lanes.at[i], static_cast<const char*>(memory) + i * sizeof lanes.at[i],
                        sizeof lanes.at[i]);
    return lanes;
}
template <class Lanes>
void masked_store(void* memory, uint32_t mask, const Lanes& lanes) {
    for (size_t i = 0; i < std::size(lanes.at); ++i)
        if (mask >> i & 1)
            std::memcpy(static_cast<char*>(memory) + i * sizeof lanes.at[i], &lanes.at[i],
                        sizeof lanes.at[i]);
}

inline float without_subnormal(float value) {
    return std::fabs(value) < std::numeric_limits<float>::min() ? 0.0f : value;
}
inline float from_bfloat16(uint16_t value) {
    return without_subnormal(bits<float>(static_cast<uint32_t>(value) << 16));
}
inline uint16_t to_bfloat16(float value) {
    const uint32_t word = bits<uint32_t>(without_subnormal(value));
    if (std::isnan(value)) return static_cast<uint16_t>(word >> 16 | 0x40);
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
inline float multiply_add(float a, float b, float c) {
    return static_cast<float>(static_cast<double>(a) * b + c);
}

// Lanes of 128 bits, of which four make a vector: the low or high halves of two, interleaved.
template <class Lane>
__m512i unpack(__m512i a, __m512i b, size_t first) {
    const auto x = bits<Lanes64<Lane>>(a), y = bits<Lanes64<Lane>>(b);
    Lanes64<Lane> out;
    constexpr size_t kLanes = 16 / sizeof(Lane);
    for (size_t i = 0; i < std::size(out.at); ++i) {
        const size_t from = i / kLanes * kLanes + first + i % kLanes / 2;
        out.at[i] = i % 2 ? y.at[from] : x.at[from];
    }
    return bits<__m512i>(out);
}

}  // namespace avx512

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_set1_ps(float value) { return value - __m512{}; }
inline __m512i _mm512_set1_epi32(int32_t value) {
    avx512::Words words;
    for (uint32_t& word : words.at) word = static_cast<uint32_t>(value);
    return avx512::bits<__m512i>(words);
}
inline __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    for (int i = 0; i < 16; ++i) c[i] = avx512::multiply_add(a[i], b[i], c[i]);
    return c;
}
inline __m512 _mm512_maskz_sub_ps(__mmask16 mask, __m512 a, __m512 b) {
    for (int i = 0; i < 16; ++i) a[i] = mask >> i & 1 ? a[i] - b[i] : 0.0f;
    return a;
}
inline float _mm512_reduce_add_ps(__m512 a) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) a[i] += a[i + half];
    return a[0];
}
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
    auto words = avx512::bits<avx512::Words>(a);
    for (uint32_t& word : words.at) word <<= n;
    return avx512::bits<__m512i>(words);
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    const auto halves = avx512::bits<avx512::Lanes32<uint16_t>>(a);
    avx512::Words words;
    for (int i = 0; i < 16; ++i) words.at[i] = halves.at[i];
    return avx512::bits<__m512i>(words);
}

inline __m512 _mm512_load_ps(const void* memory) {
    avx512::check_aligned(memory);
    return *static_cast<const __m512*>(memory);
}
inline __m512i _mm512_load_si512(const void* memory) {
    avx512::check_aligned(memory);
    return *static_cast<const __m512i*>(memory);
}
inline void _mm512_store_ps(void* memory, __m512 a) {
    avx512::check_aligned(memory);
    *static_cast<__m512*>(memory) = a;
}
inline void _mm512_store_si512(void* memory, __m512i a) {
    avx512::check_aligned(memory);
    *static_cast<__m512i*>(memory) = a;
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* memory) {
    return avx512::bits<__m512>(avx512::masked_load<avx512::Floats>(mask, memory));
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* memory) {
    return avx512::bits<__m512i>(avx512::masked_load<avx512::Lanes64<uint16_t>>(mask, memory));
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* memory) {
    return avx512::bits<__m256i>(avx512::masked_load<avx512::Lanes32<uint16_t>>(mask, memory));
}
inline void _mm512_mask_storeu_ps(void* memory, __mmask16 mask, __m512 a) {
    avx512::masked_store(memory, mask, avx512::bits<avx512::Floats>(a));
}
inline void _mm512_mask_storeu_epi32(void* memory, __mmask16 mask, __m512i a) {
    avx512::masked_store(memory, mask, avx512::bits<avx512::Words>(a));
}
inline void _mm256_mask_storeu_epi16(void* memory, __mmask16 mask, __m256i a) {
    avx512::masked_store(memory, mask, avx512::bits<avx512::Lanes32<uint16_t>>(a));
}

inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
    return avx512::unpack<uint32_t>(a, b, 0);
}
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
    return avx512::unpack<uint32_t>(a, b, 2);
}
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) {
    return avx512::unpack<uint64_t>(a, b, 0);
}
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) {
    return avx512::unpack<uint64_t>(a, b, 1);
}
// Two of a's lanes of 128 bits, then two of b's, as the pairs of bits of `which` say.
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int which) {
    __m512i out;
    for (int lane = 0; lane < 4; ++lane) {
        const int from = which >> 2 * lane & 3;
        for (int i = 0; i < 2; ++i) out[2 * lane + i] = (lane < 2 ? a : b)[2 * from + i];
    }
    return out;
}

inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
    __m256bh out;
    for (int i = 0; i < 16; ++i) out[i] = static_cast<short>(avx512::to_bfloat16(a[i]));
    return out;
}
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    const auto x = avx512::bits<avx512::Lanes64<uint16_t>>(a);
    const auto y = avx512::bits<avx512::Lanes64<uint16_t>>(b);
    auto sums = avx512::bits<avx512::Floats>(sum);
    for (int odd = 1; odd >= 0; --odd) {
        for (int i = 0; i < 16; ++i) {
            const float left = avx512::from_bfloat16(x.at[2 * i + odd]);
            const float right = avx512::from_bfloat16(y.at[2 * i + odd]);
            const float before = avx512::without_subnormal(sums.at[i]);
            sums.at[i] = avx512::without_subnormal(avx512::multiply_add(left, right, before));
        }
    }
    return avx512::bits<__m512>(sums);
}

// AMX: eight tiles of up to 16 rows of 64 bytes, whose sizes ldtilecfg sets and of which it is an
// error to use one without.
namespace amx {

struct Config {
    uint8_t palette, start_row, zeros[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
struct Tile {
    uint32_t at[16][16];
};
inline thread_local Config config{};
inline thread_local Tile tiles[8];

inline void check(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "amx: %s\n", what);
    std::abort();
}
inline void check_used(int tile) {
    check(config.palette == 1, "no configuration");
    check(config.rows[tile] > 0 && config.row_bytes[tile] > 0, "a tile without a size");
}
inline void copy(int tile, char* memory, int64_t stride, bool load) {
    check_used(tile);
    for (int r = 0; r < config.rows[tile]; ++r) {
        char *here = reinterpret_cast<char*>(tiles[tile].at[r]), *there = memory + r * stride;
        std::memcpy(load ? here : there, load ? there : here, config.row_bytes[tile]);
    }
}

}  // namespace amx

inline void _tile_loadconfig(const void* memory) {
    std::memcpy(&amx::config, memory, sizeof amx::config);
    std::memset(amx::tiles, 0, sizeof amx::tiles);
    for (int tile = 0; tile < 16; ++tile) {
        const int rows = amx::config.rows[tile], bytes = amx::config.row_bytes[tile];
        amx::check(rows <= 16 && bytes <= 64 && (rows > 0) == (bytes > 0), "a tile's size");
        amx::check(tile < 8 || rows == 0, "there are eight tiles");
    }
}
inline void _tile_release() { amx::config = amx::Config{}; }
inline void _tile_zero(int tile) {
    amx::check_used(tile);
    std::memset(&amx::tiles[tile], 0, sizeof amx::tiles[tile]);
}
inline void _tile_loadd(int tile, const void* memory, int64_t stride) {
    std::memset(&amx::tiles[tile], 0, sizeof amx::tiles[tile]);
    amx::copy(tile, const_cast<char*>(static_cast<const char*>(memory)), stride, true);
}
inline void _tile_stored(int tile, void* memory, int64_t stride) {
    amx::copy(tile, static_cast<char*>(memory), stride, false);
}
inline void _tile_dpbf16ps(int sum, int a, int b) {
    for (int tile : {sum, a, b}) amx::check_used(tile);
    const amx::Config& c = amx::config;
    amx::check(c.rows[sum] == c.rows[a] && c.row_bytes[sum] == c.row_bytes[b] &&
                   c.row_bytes[a] == 4 * c.rows[b],
               "sizes that do not make a product");
    for (int m = 0; m < c.rows[sum]; ++m) {
        float halves[2][16] = {};
        for (int k = 0; k < c.rows[b]; ++k) {
            for (int n = 0; n < 32; ++n) {
                const int half = n % 2;
                const float left = avx512::from_bfloat16(
                    static_cast<uint16_t>(amx::tiles[a].at[m][k] >> 16 * half));
                const float right = avx512::from_bfloat16(
                    static_cast<uint16_t>(amx::tiles[b].at[k][n / 2] >> 16 * half));
                float& to = halves[half][n / 2];
                to = avx512::without_subnormal(avx512::multiply_add(left, right, to));
            }
        }
        for (int n = 0; n < c.row_bytes[sum] / 4; ++n) {
            uint32_t& to = amx::tiles[sum].at[m][n];
            const float both = avx512::without_subnormal(halves[0][n] + halves[1][n]);
            const float before = avx512::without_subnormal(avx512::bits<float>(to));
            to = avx512::bits<uint32_t>(avx512::without_subnormal(before + both));
        }
    }
}
