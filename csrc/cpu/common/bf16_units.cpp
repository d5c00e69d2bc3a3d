#include "cpu/common/bf16_units.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#ifdef MFOPS_WITH_BF16
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mfops::cpu::bf16 {

namespace {

std::string avx512_missing() {
#ifdef MFOPS_WITH_BF16
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16")) {
        return "";
    }
#endif
    return "the processor has no AVX512-BF16";
}

// Linux lets a process use the tiles, 8 KiB of registers, once it has asked. The request fails
// where the processor has none.
bool ask_for_tiles() {
#if defined(MFOPS_BF16_EMULATED)
    return true;
#elif defined(MFOPS_WITH_BF16)
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTiles = 18;                  // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTiles) == 0;
#else
    return false;
#endif
}

bool has_amx_bf16() {
#if defined(MFOPS_BF16_EMULATED)
    return true;
#elif defined(MFOPS_WITH_BF16)
    // CPUID, leaf 7: __builtin_cpu_supports knows AMX in some compilers only.
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    unsigned a = 7, b, c = 0, d;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return (d & kBf16) && (d & kTile);
#else
    return false;
#endif
}

std::string amx_missing() {
    if (const std::string missing = avx512_missing(); !missing.empty()) return missing;
    if (!has_amx_bf16()) return "the processor has no AMX with bfloat16";
    return ask_for_tiles() ? "" : "Linux does not let this process use AMX";
}

struct Choice {
    Units units;
    std::string reason;
};

Choice choose() {
    const std::string name = "MFOPS_CPU_PRODUCTS";
    const char* value = std::getenv(name.c_str());
    const std::string wish = value ? value : "";
    if (wish == "float32") return {Units::kNone, name + "=float32"};
    const auto wanted = [&](const Units wanted_units, const std::string& missing) -> Choice {
        if (missing.empty()) return {wanted_units, ""};
        throw std::runtime_error(name + "=" + wish + ": " + missing);
    };
    if (wish == "avx512_bf16") return wanted(Units::kAvx512, avx512_missing());
    if (wish == "amx_bf16") return wanted(Units::kAmx, amx_missing());
    if (!wish.empty()) {
        throw std::runtime_error(name + ": expected float32, avx512_bf16 or amx_bf16, got '" +
                                 wish + "'");
    }
    if (const std::string missing = avx512_missing(); !missing.empty()) {
        return {Units::kNone, missing};
    }
    return {amx_missing().empty() ? Units::kAmx : Units::kAvx512, ""};
}

const Choice& choice() {
    static const Choice chosen = choose();
    return chosen;
}

}  // namespace

Units units() { return choice().units; }

const std::string& unavailable_reason() { return choice().reason; }

std::string units_name() {
    switch (units()) {
        case Units::kAmx:
            return "AMX";
        case Units::kAvx512:
            return "AVX512-BF16";
        case Units::kNone:
            break;
    }
    return "";
}

#ifdef MFOPS_WITH_BF16

namespace {

// kRows rows from a_0 on, `stride` apart, times 16 kVectors columns. With 6 rows and 4 vectors the
// sums take 24 of the 32 registers.
template <int kRows, int kVectors>
MFOPS_BF16 void multiply_vectors(const uint16_t* a, int64_t stride, const uint32_t* b,
                                 int64_t pairs, float* values) {
    __m512 sums[kRows][kVectors];
    for (auto& row : sums)
        for (__m512& sum : row) sum = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p) {
        __m512bh columns[kVectors];
        for (int v = 0; v < kVectors; ++v)
            columns[v] = (__m512bh)_mm512_load_si512(b + p * kPanelCols + 16 * v);
        for (int r = 0; r < kRows; ++r) {
            int32_t pair;
            std::memcpy(&pair, a + r * stride + 2 * p, sizeof pair);
            const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < kVectors; ++v)
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], row, columns[v]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v)
            _mm512_store_ps(values + r * kPanelCols + 16 * v, sums[r][v]);
}

template <int kVectors>
void multiply_rows(const uint16_t* a, int64_t stride, int64_t rows, const uint32_t* b,
                   int64_t pairs, float* values) {
    int64_t r = 0;
    const auto step = [&](const auto& multiply, int64_t n) {
        for (; r + n <= rows; r += n)
            multiply(a + r * stride, stride, b, pairs, values + r * kPanelCols);
    };
    step(multiply_vectors<6, kVectors>, 6);
    step(multiply_vectors<4, kVectors>, 4);
    step(multiply_vectors<2, kVectors>, 2);
    step(multiply_vectors<1, kVectors>, 1);
}

// What `ldtilecfg` reads. Tiles 0 to 3 are sums, 4 is 32 columns of a's rows and 6 as many rows of
// b; 5 and 7 are the like for what is left of them.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0;
    uint8_t zeros[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
constexpr int64_t kTilePairs = 16;

MFOPS_AMX void configure_tiles(int64_t rows, int64_t pairs) {
    TileConfig config;
    const auto set = [&](int tile, int64_t n, int64_t words) {
        config.rows[tile] = static_cast<uint8_t>(n);
        config.row_bytes[tile] = static_cast<uint16_t>(4 * words);
    };
    for (int tile = 0; tile < 4; ++tile) set(tile, rows, 16);
    const int64_t left = pairs % kTilePairs;
    set(4, rows, kTilePairs);
    set(6, kTilePairs, 16);
    set(5, left ? rows : 0, left);
    set(7, left, left ? 16 : 0);
    // GCC's intrinsic says that it reads 8 bytes, and the other stores would be left out.
    __asm__ volatile("" : : "m"(config));
    _tile_loadconfig(&config);
}

MFOPS_AMX void release_tiles() { _tile_release(); }

// Adds tile A times kTilePairs pairs of b, or those left, to the sums; B holds 16 columns of them.
// The numbers of tiles are part of an instruction, so this cannot be a function.
#define MFOPS_ADD_PRODUCTS(A, B)                   \
    _tile_loadd(A, a + 2 * p, a_bytes);            \
    _tile_loadd(B, b + p * kPanelCols, kRowBytes); \
    _tile_dpbf16ps(0, A, B);                       \
    if constexpr (kVectors == 4) {                 \
        const uint32_t* next = b + p * kPanelCols; \
        _tile_loadd(B, next + 16, kRowBytes);      \
        _tile_dpbf16ps(1, A, B);                   \
        _tile_loadd(B, next + 32, kRowBytes);      \
        _tile_dpbf16ps(2, A, B);                   \
        _tile_loadd(B, next + 48, kRowBytes);      \
        _tile_dpbf16ps(3, A, B);                   \
    }

// The rows that the tiles are set to, times 16 kVectors columns.
template <int kVectors>
MFOPS_AMX void multiply_tiles(const uint16_t* a, int64_t stride, const uint32_t* b, int64_t pairs,
                              float* values) {
    constexpr int64_t kRowBytes = 4 * kPanelCols;
    const int64_t a_bytes = 2 * stride;
    _tile_zero(0);
    if constexpr (kVectors == 4) {
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    int64_t p = 0;
    for (; p + kTilePairs <= pairs; p += kTilePairs) {
        // The next block's rows: the processor foresees none that lie far apart.
        for (int64_t r = 0; r < kBlockRows; ++r)
            __builtin_prefetch(a + (kBlockRows + r) * stride + 2 * p);
        MFOPS_ADD_PRODUCTS(4, 6)
    }
    if (p < pairs) {
        MFOPS_ADD_PRODUCTS(5, 7)
    }
    _tile_stored(0, values, kRowBytes);
    if constexpr (kVectors == 4) {
        _tile_stored(1, values + 16, kRowBytes);
        _tile_stored(2, values + 32, kRowBytes);
        _tile_stored(3, values + 48, kRowBytes);
    }
}
#undef MFOPS_ADD_PRODUCTS

}  // namespace

Multiplier::~Multiplier() {
    if (tile_rows_) release_tiles();  // else every switch of threads saves them
}

void Multiplier::multiply(int64_t row, int64_t col, float* values) {
    const int64_t rows = std::min(kBlockRows, a_.rows - row);
    const uint16_t* a = a_.data + row * a_.stride;
    const uint32_t* b = b_.data + b_.at(0, col);
    const bool whole = col + kPanelCols <= b_.cols;
    if (!amx_) {
        const auto multiply_all = whole ? multiply_rows<kBlockVectors> : multiply_rows<1>;
        return multiply_all(a, a_.stride, rows, b, b_.count, values);
    }
    if (tile_rows_ != rows) {
        configure_tiles(rows, b_.count);
        tile_rows_ = rows;
    }
    const auto multiply_all = whole ? multiply_tiles<kBlockVectors> : multiply_tiles<1>;
    multiply_all(a, a_.stride, b, b_.count, values);
}

#endif

}  // namespace mfops::cpu::bf16
