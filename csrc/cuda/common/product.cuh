// Products of tiles in shared memory, accumulated in registers by all warps of a block.
//
// Every type keeps its accumulators as mma.sync does (lane = 4 g + t holds rows g, g + 8 and
// columns 2t, 2t + 1 of each 16 x 8 piece), IEEE float32 on the plain FMA units too, so that what
// happens to the accumulators is written once.
#pragma once

#include "cuda/common/tile.cuh"

namespace mfops::cuda {

// Contracted indices, and the bases of factors, come in whole 16s.
__host__ __device__ constexpr int padded_16(int n) { return (n + 15) / 16 * 16; }

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

// Four values along the contracted index k from k on, for plain FMAs. `kByK`: the tile's lines run
// along k.
template <bool kByK, class Tile>
__device__ __forceinline__ void load_four(float (&v)[4], const Tile& tile, int other, int k) {
    if constexpr (kByK) {
        uint4 bits;
        load_shared(bits, tile.at(other, k));
        v[0] = as_float(bits.x), v[1] = as_float(bits.y);
        v[2] = as_float(bits.z), v[3] = as_float(bits.w);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = *tile.at(k + i, other);
    }
}

// What one step along k multiplies: a piece of A (16 x kStep), a piece of B (kStep x 8 kPieces),
// and their product, added to kPieces of the 16 x 8 pieces that accumulators are made of.
template <Type kType>
struct Fragments {  // 16 bits
    static constexpr int kStep = 16, kPieces = 2;
    using A = uint32_t[4];
    using B = uint32_t[4];

    template <bool kByK, class Tile>
    static __device__ __forceinline__ void load_a(A& a, const Tile& tile, int row, int k) {
        const int lane = threadIdx.x % 32, matrix = lane / 8, within = lane % 8;
        if constexpr (kByK) {
            ldmatrix(a, tile.at(row + matrix % 2 * 8 + within, k + matrix / 2 * 8));
        } else {
            ldmatrix_trans(a, tile.at(k + matrix / 2 * 8 + within, row + matrix % 2 * 8));
        }
    }

    template <bool kByK, class Tile>
    static __device__ __forceinline__ void load_b(B& b, const Tile& tile, int k, int col) {
        const int lane = threadIdx.x % 32, matrix = lane / 8, within = lane % 8;
        if constexpr (kByK) {
            ldmatrix(b, tile.at(col + matrix / 2 * 8 + within, k + matrix % 2 * 8));
        } else {
            ldmatrix_trans(b, tile.at(k + matrix % 2 * 8 + within, col + matrix / 2 * 8));
        }
    }

    static __device__ __forceinline__ void multiply(float (*acc)[4], const A& a, const B& b) {
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
        mma<Element<kType>>(acc[0], a, left);
        mma<Element<kType>>(acc[1], a, right);
    }
};

template <>
struct Fragments<Type::kTf32> {
    static constexpr int kStep = 8, kPieces = 1;
    using A = uint32_t[4];
    using B = uint32_t[2];

    template <bool kByK, class Tile>
    static __device__ __forceinline__ void load_a(A& a, const Tile& tile, int row, int k) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = row + g + i % 2 * 8, kk = k + t + i / 2 * 4;
            a[i] = to_tf32(to_float(kByK ? *tile.at(r, kk) : *tile.at(kk, r)));
        }
    }

    template <bool kByK, class Tile>
    static __device__ __forceinline__ void load_b(B& b, const Tile& tile, int k, int col) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int kk = k + t + i * 4;
            b[i] = to_tf32(kByK ? *tile.at(col + g, kk) : *tile.at(kk, col + g));
        }
    }

    static __device__ __forceinline__ void multiply(float (*acc)[4], const A& a, const B& b) {
        mma_tf32(acc[0], a, b);
    }
};

template <>
struct Fragments<Type::kFloat32> {  // on the plain FMA units
    static constexpr int kStep = 4, kPieces = 1;
    using A = float[2][4];  // rows g and g + 8
    using B = float[2][4];  // columns 2t and 2t + 1

    template <bool kByK, class Tile>
    static __device__ __forceinline__ void load_a(A& a, const Tile& tile, int row, int k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            load_four<kByK>(a[half], tile, row + 8 * half + threadIdx.x % 32 / 4, k);
        }
    }

    template <bool kByK, class Tile>
    static __device__ __forceinline__ void load_b(B& b, const Tile& tile, int k, int col) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            load_four<kByK>(b[side], tile, col + threadIdx.x % 4 * 2 + side, k);
        }
    }

    static __device__ __forceinline__ void multiply(float (*acc)[4], const A& a, const B& b) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[0][j] += a[j / 2][i] * b[j % 2][i];
    }
};

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
    template <bool kAByK, bool kBByK, class TileA, class TileB>
    __device__ __forceinline__ void add(const TileA& a, const TileB& b, int contraction) {
        if constexpr (kTwoSteps) {
            add_ahead<kAByK, kBByK>(a, b, contraction);
        } else {
            add_step_by_step<true, kAByK, kBByK>(a, b, contraction, 16 * kM, 8 * kN);
        }
    }

    // The same, but pieces from row_limit, col_limit (multiples of 16) on are left alone.
    template <bool kAByK, bool kBByK, class TileA, class TileB>
    __device__ __forceinline__ void add(const TileA& a, const TileB& b, int contraction,
                                        int row_limit, int col_limit) {
        // Of this warp's pieces; mostly all are inside, or none.
        const int rows = row_limit - first_row(), cols = col_limit - first_col();
        if (kType != Type::kFloat32 && rows >= 16 * kM && cols >= 8 * kN) {
            add<kAByK, kBByK>(a, b, contraction);
        } else if (!kRoomy || ((kM > 1 || kN > 2) && rows > 0 && cols > 0)) {
            add_step_by_step<false, kAByK, kBByK>(a, b, contraction, rows, cols);
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
    static_assert(kGrid.rows > 0, "the warps cannot share a matrix of this shape");
    using F = Fragments<kType>;
    static constexpr int kM = kRows / kGrid.rows / 16, kN = kCols / kGrid.cols / 8;

    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
    static __device__ __forceinline__ int first_row() {
        return threadIdx.x / 32 / kGrid.cols * (16 * kM);
    }
    static __device__ __forceinline__ int first_col() {
        return threadIdx.x / 32 % kGrid.cols * (8 * kN);
    }

    // What a step multiplies.
    struct Step {
        typename F::A a[kM];
        typename F::B b[kN / F::kPieces];
    };
    // Whether registers have room: a thread of 16 warps has 128, one of 8 has 255, but float32's
    // fragments are large.
    static constexpr bool kRoomy = kWarps <= 8 && kType != Type::kFloat32;
    // And for two steps: small ones with no more of B than of A, since with pieces that are wide,
    // as for 256 bases, registers are short.
    static constexpr bool kTwoSteps =
        kRoomy && sizeof(Step) <= 64 && sizeof(Step::a) >= sizeof(Step::b);

    template <bool kAByK, bool kBByK, class TileA, class TileB>
    static __device__ __forceinline__ void load(Step& step, const TileA& a, const TileB& b, int k,
                                                int row, int col) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            F::template load_a<kAByK>(step.a[m], a, row + 16 * m, k);
        }
#pragma unroll
        for (int n = 0; n < kN; n += F::kPieces) {
            F::template load_b<kBByK>(step.b[n / F::kPieces], b, k, col + 8 * n);
        }
    }

    __device__ __forceinline__ void multiply(const Step& step) {
#pragma unroll
        for (int n = 0; n < kN; n += F::kPieces)
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                F::multiply(&acc_[m][n], step.a[m], step.b[n / F::kPieces]);
            }
    }

    // What the next step multiplies is on its way from shared memory meanwhile.
    template <bool kAByK, bool kBByK, class TileA, class TileB>
    __device__ __forceinline__ void add_ahead(const TileA& a, const TileB& b, int contraction) {
        Step step, next;
        const int row = no_hoist(first_row()), col = no_hoist(first_col());
        load<kAByK, kBByK>(step, a, b, 0, row, col);
#pragma unroll 2
        for (int k = F::kStep; k < contraction; k += F::kStep) {
            load<kAByK, kBByK>(next, a, b, k, row, col);
            multiply(step);
            step = next;
        }
        multiply(step);
    }

    // Step by step, where one alone takes many registers; in what order a step's loads and products
    // are issued the compiler decides. kAll: no limits, and so no branches.
    template <bool kAll, bool kAByK, bool kBByK, class TileA, class TileB>
    __device__ __forceinline__ void add_step_by_step(const TileA& a, const TileB& b,
                                                     int contraction, int rows, int cols) {
        const int row = no_hoist(first_row()), col = no_hoist(first_col());
#pragma unroll 1
        for (int k = 0; k < contraction; k += F::kStep) {
            typename F::A fa[kM];
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                if (!kAll && 16 * m >= rows) continue;
                F::template load_a<kAByK>(fa[m], a, row + 16 * m, k);
            }
#pragma unroll
            for (int n = 0; n < kN; n += F::kPieces) {
                if (!kAll && 8 * n >= cols) continue;
                typename F::B fb;
                F::template load_b<kBByK>(fb, b, k, col + 8 * n);
#pragma unroll
                for (int m = 0; m < kM; ++m) {
                    if (kAll || 16 * m < rows) F::multiply(&acc_[m][n], fa[m], fb);
                }
            }
        }
    }

    float acc_[kM][kN][4];
};

}  // namespace mfops::cuda
