// csrc/cuda/common/primitives.cuh for the emulator: the same functions, performed on the CPU and
// checked.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "../../fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define MFOPS_CLUSTERS 1

using std::max;
using std::min;

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

inline float __fdividef(float a, float b) { return a / b; }
inline void __syncthreads(mfops::emulator::Where where = mfops::emulator::Where::current()) {
    mfops::emulator::wait("__syncthreads", where);
}

namespace mfops::cuda {

using emulator::Where;

inline int no_hoist(int v) { return v; }
inline unsigned no_hoist(unsigned v) { return v; }
inline int64_t no_hoist(int64_t v) { return v; }

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(f16 v) {
    const uint32_t sign = (v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
    if (rest > 0x7c00) return std::bit_cast<float>(0x7fffffffu);
    if (rest == 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u);
    const float magnitude = rest < 0x0400 ? static_cast<float>(rest) * 0x1p-24f
                                          : std::bit_cast<float>((rest << 13) + 0x38000000u);
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

// A NaN becomes the one NaN that the hardware makes of all.
template <class T>
inline T from_float(float v);
template <>
inline float from_float<float>(float v) {
    return v;
}
template <>
inline bf16 from_float<bf16>(float v) {
    const uint32_t bits = std::bit_cast<uint32_t>(v);
    if (std::isnan(v)) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float v) {
    const uint32_t bits = std::bit_cast<uint32_t>(v), rest = bits & 0x7fffffffu;
    const uint32_t sign = bits >> 16 & 0x8000;
    if (std::isnan(v)) return {0x7fff};
    uint32_t magnitude;
    if (rest >= 0x477ff000) {  // 65520, the first that rounds to infinity
        magnitude = 0x7c00;
    } else if (rest < 0x38800000) {  // below 2^-14: a multiple of 2^-24
        magnitude = static_cast<uint32_t>(std::nearbyint(std::fabs(v) * 0x1p24f));
    } else {
        magnitude = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
    }
    return {static_cast<uint16_t>(sign | magnitude)};
}

// As the hardware does it: a NaN is cut off too, and all that it has in the last 13 bits is lost.
inline uint32_t to_tf32(float v) {
    const uint32_t bits = std::bit_cast<uint32_t>(v);
    return (std::isfinite(v) ? bits + 0x1000 : bits) & ~0x1fffu;
}

// Fails unless `bytes` bytes at `address` are in shared memory, at a multiple of as many.
inline void check_shared(const void* address, int bytes, const char* operation,
                         const Where& where) {
    const auto offset = static_cast<std::ptrdiff_t>(reinterpret_cast<uintptr_t>(address)) -
                        static_cast<std::ptrdiff_t>(reinterpret_cast<uintptr_t>(emulator::shared));
    const auto end = static_cast<std::ptrdiff_t>(emulator::shared_bytes);
    if (offset >= 0 && offset + bytes <= end && offset % bytes == 0) return;
    emulator::fail(std::string(operation) + " of " + std::to_string(bytes) + " bytes at byte " +
                       std::to_string(offset) + " of " + std::to_string(end) + " in shared memory",
                   where);
}

template <class Bits>
void load(Bits& bits, const void* from, const Where& where) {
    check_shared(from, sizeof(bits), "load_shared", where);
    std::memcpy(&bits, from, sizeof(bits));
}
inline void load_shared(uint32_t& bits, const void* from, Where where = Where::current()) {
    load(bits, from, where);
}
inline void load_shared(uint2& bits, const void* from, Where where = Where::current()) {
    load(bits, from, where);
}
inline void load_shared(uint4& bits, const void* from, Where where = Where::current()) {
    load(bits, from, where);
}
inline void store_shared(void* to, uint32_t bits, Where where = Where::current()) {
    check_shared(to, sizeof(bits), "store_shared", where);
    std::memcpy(to, &bits, sizeof(bits));
}
inline void store_shared(void* to, uint2 bits, Where where = Where::current()) {
    check_shared(to, sizeof(bits), "store_shared", where);
    std::memcpy(to, &bits, sizeof(bits));
}
inline void store_shared(void* to, uint4 bits, Where where = Where::current()) {
    check_shared(to, sizeof(bits), "store_shared", where);
    std::memcpy(to, &bits, sizeof(bits));
}
inline void check_global(const void* address, const char* operation, const Where& where) {
    if (reinterpret_cast<uintptr_t>(address) % 16 == 0) return;
    emulator::fail(std::string(operation) + ": an address that is no multiple of 16", where);
}
inline void store_global(void* to, uint4 bits, Where where = Where::current()) {
    check_global(to, "store_global", where);
    std::memcpy(to, &bits, sizeof(bits));
}

// Until a wait performs it the destination is poison, so who reads it too early sees NaN, and so
// does who still reads what was there before.
inline void cp_async_16(void* shared, const void* global, int bytes,
                        Where where = Where::current()) {
    check_shared(shared, 16, "cp_async_16", where);
    check_global(global, "cp_async_16", where);
    if (bytes < 0 || bytes > 16) {
        emulator::fail("cp_async_16 of " + std::to_string(bytes) + " bytes", where);
    }
    std::memset(shared, emulator::kPoison, 16);
    emulator::Fiber& self = *emulator::current;
    self.copies.push_back({shared, global, bytes, self.closed_groups});
}
inline void cp_async_16(void* shared, const void* global, Where where = Where::current()) {
    cp_async_16(shared, global, 16, where);
}
inline void cp_async_commit() { ++emulator::current->closed_groups; }
template <int kPending>
inline void cp_async_wait() {
    static_assert(kPending >= 0);
    emulator::Fiber& self = *emulator::current;
    auto copy = self.copies.begin();
    for (; copy != self.copies.end() && copy->group + kPending < self.closed_groups; ++copy) {
        std::memset(copy->to, 0, 16);
        std::memcpy(copy->to, copy->from, static_cast<size_t>(copy->bytes));
    }
    self.copies.erase(self.copies.begin(), copy);
}

// ldmatrix for all lanes; kTrans as in ldmatrix_trans.
struct MatrixLoad {
    uint32_t* r;
    const void* row;
};
template <bool kTrans>
void load_matrices(void* const* lanes) {
    uint16_t rows[32][8];
    for (int lane = 0; lane < 32; ++lane) {
        std::memcpy(rows[lane], static_cast<MatrixLoad*>(lanes[lane])->row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            const auto matrix = rows + 8 * i;
            const uint16_t low = kTrans ? matrix[2 * t][g] : matrix[g][2 * t];
            const uint16_t high = kTrans ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
            static_cast<MatrixLoad*>(lanes[lane])->r[i] = low | static_cast<uint32_t>(high) << 16;
        }
    }
}
inline void ldmatrix(uint32_t (&r)[4], const void* row, Where where = Where::current()) {
    check_shared(row, 16, "ldmatrix", where);
    MatrixLoad load{r, row};
    emulator::wait("ldmatrix", where, load_matrices<false>, &load);
}
inline void ldmatrix_trans(uint32_t (&r)[4], const void* row, Where where = Where::current()) {
    check_shared(row, 16, "ldmatrix_trans", where);
    MatrixLoad load{r, row};
    emulator::wait("ldmatrix_trans", where, load_matrices<true>, &load);
}

struct Product {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
};

// d (16 x 8) += a (16 x kDepth) b (kDepth x 8), where d's fragments are. A product of two 16-bit or
// TF32 numbers is exact in float32; each sum is rounded.
template <int kDepth>
void multiply(void* const* lanes, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
    // Half a row at a time: vectors take half the time, and this is where the emulator spends most.
    using Half = float __attribute__((vector_size(16)));
    Half rows[kDepth][2];
    std::memcpy(rows, b, sizeof(rows));
    for (int i = 0; i < 16; ++i) {
        float values[8];
        for (int j = 0; j < 8; ++j) {
            values[j] = static_cast<Product*>(lanes[4 * (i % 8) + j / 2])->d[i / 8 * 2 + j % 2];
        }
        Half sums[2];
        std::memcpy(sums, values, sizeof(sums));
        for (int k = 0; k < kDepth; ++k) {
            sums[0] += a[i][k] * rows[k][0];
            sums[1] += a[i][k] * rows[k][1];
        }
        std::memcpy(values, sums, sizeof(sums));
        for (int j = 0; j < 8; ++j) {
            static_cast<Product*>(lanes[4 * (i % 8) + j / 2])->d[i / 8 * 2 + j % 2] = values[j];
        }
    }
}
template <class T>
void multiply_16(void* const* lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const Product& product = *static_cast<Product*>(lanes[lane]);
        for (int half = 0; half < 2; ++half) {
            const auto element = [half](uint32_t pair) {
                return to_float(T{static_cast<uint16_t>(pair >> 16 * half)});
            };
            a[g][2 * t + half] = element(product.a[0]);
            a[g + 8][2 * t + half] = element(product.a[1]);
            a[g][2 * t + 8 + half] = element(product.a[2]);
            a[g + 8][2 * t + 8 + half] = element(product.a[3]);
            b[2 * t + half][g] = element(product.b[0]);
            b[2 * t + 8 + half][g] = element(product.b[1]);
        }
    }
    multiply(lanes, a, b);
}
inline void multiply_tf32(void* const* lanes) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const Product& product = *static_cast<Product*>(lanes[lane]);
        const auto element = [](uint32_t bits) {
            return std::bit_cast<float>(bits & ~0x1fffu);  // the hardware reads no more of them
        };
        a[g][t] = element(product.a[0]);
        a[g + 8][t] = element(product.a[1]);
        a[g][t + 4] = element(product.a[2]);
        a[g + 8][t + 4] = element(product.a[3]);
        b[t][g] = element(product.b[0]);
        b[t + 4][g] = element(product.b[1]);
    }
    multiply(lanes, a, b);
}
template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                Where where = Where::current()) {
    Product product{d, a, b};
    emulator::wait("mma", where, multiply_16<T>, &product);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     Where where = Where::current()) {
    Product product{d, a, b};
    emulator::wait("mma_tf32", where, multiply_tf32, &product);
}

inline void sync_warp(Where where = Where::current()) {
    emulator::wait("sync_warp", where, [](void* const*) {}, nullptr);
}
inline double shuffle_down(double v, int offset, Where where = Where::current()) {
    struct Shuffle {
        double v;
        int offset;
        double result;
    } shuffle{v, offset, v};
    emulator::wait(
        "shuffle_down", where,
        [](void* const* lanes) {
            for (int lane = 0; lane < 32; ++lane) {
                Shuffle& to = *static_cast<Shuffle*>(lanes[lane]);
                const int from = lane + to.offset;
                if (from < 32) to.result = static_cast<Shuffle*>(lanes[from])->v;
            }
        },
        &shuffle);
    return shuffle.result;
}

inline float shuffle_xor(float v, int mask, Where where = Where::current()) {
    struct Shuffle {
        float v;
        int mask;
        float result;
    } shuffle{v, mask, v};
    emulator::wait(
        "shuffle_xor", where,
        [](void* const* lanes) {
            for (int lane = 0; lane < 32; ++lane) {
                Shuffle& to = *static_cast<Shuffle*>(lanes[lane]);
                to.result = static_cast<Shuffle*>(lanes[lane ^ to.mask])->v;
            }
        },
        &shuffle);
    return shuffle.result;
}

inline char* shared_memory() { return emulator::shared; }

inline unsigned cluster_rank() { return blockIdx.x - emulator::first_block; }
inline void cluster_sync(Where where = Where::current()) {
    emulator::wait("cluster_sync", where, nullptr, nullptr, true);
}
// Where `shared` of this block lies in another one's memory.
inline char* in_block(const void* shared, unsigned rank, int bytes, const char* operation,
                      const Where& where) {
    check_shared(shared, bytes, operation, where);
    if (!emulator::fibers[rank * blockDim.x].waits_at) {
        emulator::fail(std::string(operation) + " of a block that has ended or not begun", where);
    }
    return emulator::shared_of(rank) + (static_cast<const char*>(shared) - emulator::shared);
}
inline void load_cluster(uint4& bits, const void* from, unsigned rank,
                         Where where = Where::current()) {
    std::memcpy(&bits, in_block(from, rank, 16, "load_cluster", where), 16);
}
inline void store_cluster(void* to, unsigned rank, uint2 bits, Where where = Where::current()) {
    std::memcpy(in_block(to, rank, 8, "store_cluster", where), &bits, 8);
}
inline void load_global(uint4& bits, const void* from, Where where = Where::current()) {
    check_global(from, "load_global", where);
    std::memcpy(&bits, from, sizeof(bits));
}

template <auto Kernel, class Params>
void launch_clusters(unsigned blocks, unsigned cluster, unsigned threads, size_t shared_bytes,
                     void* /* stream */, const Params& params) {
    emulator::run_grid(
        blocks, threads, shared_bytes,
        [](const void* params) { Kernel(*static_cast<const Params*>(params)); }, &params, cluster);
}

template <auto Kernel, class Params>
void launch(unsigned blocks, unsigned threads, size_t shared_bytes, void* /* stream */,
            const Params& params) {
    emulator::run_grid(
        blocks, threads, shared_bytes,
        [](const void* params) { Kernel(*static_cast<const Params*>(params)); }, &params);
}

}  // namespace mfops::cuda
