// Matrices in shared memory without padding, for where there is no room for any.
#pragma once

#include "cuda/columns.cuh"

namespace mfops::cuda {

// A matrix whose lines start on 16 bytes, granule i of line l in the place of granule i ^ f(l).
template <class T>
struct Swizzled {
    int start, pitch;  // in elements; the pitch is a multiple of a granule
    int shift, mask;
    int first = 0, skipped = 0;  // line, element

    __host__ __device__ static constexpr Swizzled of(int start, int pitch) {
        const int granules = pitch / (16 / static_cast<int>(sizeof(T)));
        if (granules % 8 == 0) return {start, pitch, 0, 7};
        if (granules % 4 == 0) return {start, pitch, 1, 3};
        if (granules % 2 == 0) return {start, pitch, 2, 1};
        return {start, pitch, 0, 0};
    }
    __device__ __forceinline__ constexpr bool aligned() const { return true; }
    // The part of it from there on.
    __device__ __forceinline__ Swizzled from(int line, int element) const {
        return {start, pitch, shift, mask, line, element};
    }
    __device__ __forceinline__ int offset(int line, int element) const {
        const int l = line + first, e = element + skipped;
        const int granule = e / kGranule<T> ^ (l >> shift & mask);
        return start + l * pitch + granule * kGranule<T> + e % kGranule<T>;
    }
    __device__ __forceinline__ T* at(int line, int element) const {
        return reinterpret_cast<T*>(shared_memory()) + offset(line, element);
    }
    // A pair of neighbours as a tile of its own.
    __device__ __forceinline__ Tile<T, true> pair(int line, int element) const {
        return {offset(line, element), 0};
    }
};

// Fills lines x length elements of which valid_lines x valid exist; `lead` elements of each line
// lie in memory before `origin`.
template <int kThreads, class T>
__device__ __forceinline__ void fill_swizzled(const Swizzled<T>& tile, const Lines& from,
                                              const T* origin, int lines, int length,
                                              int valid_lines, int valid, int64_t lead) {
    constexpr int kG = kGranule<T>;
    const int per_line = length / kG;
#pragma unroll 2
    for (int i = threadIdx.x; i < lines * per_line; i += kThreads) {
        const int line = i / per_line, first = (i - line * per_line) * kG;
        const T* const source = origin + line * from.line + first * from.step;
        const int before = misalignment(source);
        uint4 bits{};
        if (from.step == 1 && line < valid_lines && lead + first >= before &&
            first + kG + (before ? kG - before : 0) <= valid) {
            load_global(bits, source - before);
            if (before) {
                uint4 high;
                load_global(high, source - before + kG);
                bits = window(bits, high, before * static_cast<int>(sizeof(T)));
            }
        } else {
            T element[kG];
#pragma unroll
            for (int j = 0; j < kG; ++j) {
                element[j] = line < valid_lines && first + j < valid ? source[j * from.step] : T{};
            }
            memcpy(&bits, element, sizeof(bits));
        }
        store_shared(tile.at(line, first), bits);
    }
}

// Writes the valid part to dense lines `stride` elements apart.
template <int kThreads, class T>
__device__ __forceinline__ void store_swizzled(const Swizzled<T>& tile, T* origin, int64_t stride,
                                               int lines, int length) {
    constexpr int kG = kGranule<T>;
    const int per_line = (length + kG - 1) / kG + 1;
#pragma unroll 1
    for (int i = threadIdx.x; i < lines * per_line; i += kThreads) {
        const int line = i / per_line;
        T* const to = origin + line * stride;
        const int first = (i - line * per_line) * kG - misalignment(to);
        T element[kG];
#pragma unroll
        for (int j = 0; j < kG; ++j) {
            const bool inside = first + j >= 0 && first + j < length;
            element[j] = inside ? *tile.at(line, first + j) : T{};
        }
        if (first >= 0 && first + kG <= length) {
            uint4 bits;
            memcpy(&bits, element, sizeof(bits));
            store_global(to + first, bits);
        } else {
#pragma unroll
            for (int j = 0; j < kG; ++j) {
                if (first + j >= 0 && first + j < length) to[first + j] = element[j];
            }
        }
    }
}

}  // namespace mfops::cuda
