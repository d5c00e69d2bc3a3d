// Products of tiles in shared memory, accumulated in registers by all warps of a block.
//
// Every type keeps its accumulators as mma.sync does (lane = 4 g + t holds rows g, g + 8 and
// columns 2t, 2t + 1 of each 16 x 8 piece), IEEE float32 on the plain FMA units too, so that what
// happens to the accumulators is written once.
#pragma once

#include "cuda/tile.cuh"

namespace mfops::cuda {

template <Type kType>
struct ElementOf {
    using T = float;
};
template <>
struct ElementOf<Type::kBf16> {
    using T = bf16;
};
template <>
struct ElementOf<Type::kF16> {
    using T = f16;
};
template <Type kType>
using Element = typename ElementOf<kType>::T;

// How warps share a rows x cols matrix: the split whose pieces have the shortest sides, which is
// the one that reads least shared memory.
struct WarpGrid {
    int rows = 0, cols = 0;
};
constexpr WarpGrid warp_grid(int rows, int cols, int warps, int min_cols) {
    WarpGrid best;
    int best_sides = 1 << 30;
    for (int r = 1; r <= warps; r *= 2) {
        const int c = warps / r;
        if (rows % (16 * r) != 0 || cols % (min_cols * c) != 0) continue;
        const int sides = rows / r + cols / c;
        if (sides < best_sides) {
            best = {r, c};
            best_sides = sides;
        }
    }
    return best;
}

// A (16 x 16) and B (16 x 16, as two 16 x 8) fragments of 16-bit elements. `kByK`: the tile's lines
// run along the contracted index k.
template <bool kByK, class Tile>
__device__ __forceinline__ uint32_t pair_along_k(const Tile& tile, int other, int k) {
    const auto low = kByK ? *tile.at(other, k) : *tile.at(k, other);
    const auto high = kByK ? *tile.at(other, k + 1) : *tile.at(k + 1, other);
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

template <bool kByK, class Tile>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Tile& tile, int row, int k) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, within = lane % 8;
    if (tile.aligned()) {
        if constexpr (kByK) {
            ldmatrix(a, tile.at(row + matrix % 2 * 8 + within, k + matrix / 2 * 8));
        } else {
            ldmatrix_trans(a, tile.at(k + matrix / 2 * 8 + within, row + matrix % 2 * 8));
        }
        return;
    }
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a[i] = pair_along_k<kByK>(tile, row + g + i % 2 * 8, k + 2 * t + i / 2 * 8);
    }
}

template <bool kByK, class Tile>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const Tile& tile, int k, int col) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, within = lane % 8;
    if (tile.aligned()) {
        if constexpr (kByK) {
            ldmatrix(b, tile.at(col + matrix / 2 * 8 + within, k + matrix % 2 * 8));
        } else {
            ldmatrix_trans(b, tile.at(k + matrix % 2 * 8 + within, col + matrix / 2 * 8));
        }
        return;
    }
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        b[i] = pair_along_k<kByK>(tile, col + g + i / 2 * 8, k + 2 * t + i % 2 * 8);
    }
}

// Four values along k from k on, for plain FMAs.
template <bool kByK, class Tile>
__device__ __forceinline__ void load_four(float (&v)[4], const Tile& tile, int other, int k) {
    if constexpr (kByK) {
        const float* at = tile.at(other, k);
        if (tile.aligned()) {
            uint4 bits;
            load_shared(bits, at);
            v[0] = as_float(bits.x), v[1] = as_float(bits.y);
            v[2] = as_float(bits.z), v[3] = as_float(bits.w);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = at[i];
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = *tile.at(k + i, other);
    }
}

// The accumulators of a kRows x kCols matrix.
template <Type kType, int kRows, int kCols, int kWarps,
          WarpGrid kGrid = warp_grid(kRows, kCols, kWarps, sizeof(Element<kType>) == 2 ? 16 : 8)>
class Accumulators {
   public:
    using T = Element<kType>;

    __device__ __forceinline__ Accumulators() { zero(); }

    __device__ __forceinline__ void zero() {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) acc_[m][n][i] = 0;
    }

    // Adds A B, A (kRows x contraction), B (contraction x kCols), contraction a multiple of 16.
    // Pieces from row_limit, col_limit (multiples of 16) on are left alone.
    template <bool kAByK, bool kBByK, class TileA, class TileB>
    __device__ __forceinline__ void add(const TileA& a, const TileB& b, int contraction,
                                        int row_limit = kRows, int col_limit = kCols) {
#pragma unroll 1
        for (int k = 0; k < contraction; k += kStep) {
            if constexpr (kType == Type::kFloat32) {
                add_fma<kAByK, kBByK>(a, b, k, row_limit, col_limit);
            } else if constexpr (kType == Type::kTf32) {
                add_tf32<kAByK, kBByK>(a, b, k, row_limit, col_limit);
            } else {
                add_16_bit<kAByK, kBByK>(a, b, k, row_limit, col_limit);
            }
        }
    }

    // f(row, col, v, w) with references to the accumulators of (row, col) and (row, col + 1), for
    // all of this thread's.
    template <class F>
    __device__ __forceinline__ void for_each_pair(F f) {
        for_each_pair_with(
            *this, [&](int row, int col, float& v, float& w, float, float) { f(row, col, v, w); });
    }

    // The same with the accumulators that `other` has in the same places.
    template <class F>
    __device__ __forceinline__ void for_each_pair_with(Accumulators& other, F f) {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < kN; ++n) {
                    f(first_row() + 16 * m + 8 * half + lane() / 4,
                      first_col() + 8 * n + lane() % 4 * 2, acc_[m][n][2 * half],
                      acc_[m][n][2 * half + 1], other.acc_[m][n][2 * half],
                      other.acc_[m][n][2 * half + 1]);
                }
    }

   private:
    static constexpr int kStep = kType == Type::kFloat32 ? 4 : kType == Type::kTf32 ? 8 : 16;
    static_assert(kGrid.rows > 0, "the warps cannot share a matrix of this shape");
    static constexpr int kM = kRows / kGrid.rows / 16, kN = kCols / kGrid.cols / 8;

    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
    static __device__ __forceinline__ int first_row() {
        return threadIdx.x / 32 / kGrid.cols * (16 * kM);
    }
    static __device__ __forceinline__ int first_col() {
        return threadIdx.x / 32 % kGrid.cols * (8 * kN);
    }

    template <bool kAByK, bool kBByK, class TileA, class TileB>
    __device__ __forceinline__ void add_16_bit(const TileA& a, const TileB& b, int k, int row_limit,
                                               int col_limit) {
        uint32_t fa[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            const int row = first_row() + 16 * m;
            if (row < row_limit) load_a<kAByK>(fa[m], a, row, k);
        }
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
            const int col = first_col() + 8 * n;
            if (col >= col_limit) continue;
            uint32_t fb[4];
            load_b<kBByK>(fb, b, k, col);
            const uint32_t left[2] = {fb[0], fb[1]}, right[2] = {fb[2], fb[3]};
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                if (first_row() + 16 * m >= row_limit) continue;
                mma<T>(acc_[m][n], fa[m], left);
                mma<T>(acc_[m][n + 1], fa[m], right);
            }
        }
    }

    template <bool kAByK, bool kBByK, class TileA, class TileB>
    __device__ __forceinline__ void add_tf32(const TileA& a, const TileB& b, int k, int row_limit,
                                             int col_limit) {
        const int g = lane() / 4, t = lane() % 4;
        uint32_t fa[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            const int row = first_row() + 16 * m;
            if (row >= row_limit) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = row + g + i % 2 * 8, kk = k + t + i / 2 * 4;
                fa[m][i] = to_tf32(to_float(kAByK ? *a.at(r, kk) : *a.at(kk, r)));
            }
        }
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            const int col = first_col() + 8 * n;
            if (col >= col_limit) continue;
            uint32_t fb[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int kk = k + t + i * 4;
                fb[i] = to_tf32(kBByK ? *b.at(col + g, kk) : *b.at(kk, col + g));
            }
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                if (first_row() + 16 * m < row_limit) mma_tf32(acc_[m][n], fa[m], fb);
            }
        }
    }

    template <bool kAByK, bool kBByK, class TileA, class TileB>
    __device__ __forceinline__ void add_fma(const TileA& a, const TileB& b, int k, int row_limit,
                                            int col_limit) {
        const int g = lane() / 4, t = lane() % 4;
        float fa[kM][2][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            const int row = first_row() + 16 * m;
            if (row >= row_limit) continue;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                load_four<kAByK>(fa[m][half], a, row + 8 * half + g, k);
            }
        }
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            const int col = first_col() + 8 * n;
            if (col >= col_limit) continue;
            float fb[2][4];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                load_four<kBByK>(fb[side], b, col + 2 * t + side, k);
            }
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                if (first_row() + 16 * m >= row_limit) continue;
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) acc_[m][n][j] += fa[m][j / 2][i] * fb[j % 2][i];
            }
        }
    }

    float acc_[kM][kN][4];
};

}  // namespace mfops::cuda
