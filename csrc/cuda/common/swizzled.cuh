// Matrices in shared memory without padding, for where there is no room for any.
#pragma once

#include "cuda/common/tile.cuh"

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
    // A pair of neighbors as a tile of its own.
    __device__ __forceinline__ Tile<T> pair(int line, int element) const {
        return {offset(line, element), 0};
    }
};

// 16 of the 32 bytes, from `bytes` (even) on.
__device__ __forceinline__ uint4 window(const uint4& low, const uint4& high, int bytes) {
    uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    if (bytes & 8) {
#pragma unroll
        for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
    }
    if (bytes & 4) {
#pragma unroll
        for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
    }
    if (bytes & 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = w[i] >> 16 | w[i + 1] << 16;
    }
    return {w[0], w[1], w[2], w[3]};
}

// Fills lines x length elements of which valid_lines x valid exist; `lead` elements of each line
// lie in memory before `origin`.
template <int kThreads, class T>
__device__ __forceinline__ void fill_swizzled(const Swizzled<T>& tile, const Lines& from,
                                              const T* origin, int lines, int length,
                                              int valid_lines, int valid, int64_t lead) {
    constexpr int kG = kGranule<T>, kBatch = 4;  // granules on their way at a time
    const int per_line = length / kG, granules = lines * per_line;
    const auto source = [&](int line, int element) {
        return origin + line * from.line + element * from.step;
    };
#pragma unroll 1
    for (int i = threadIdx.x; i < granules; i += kBatch * kThreads) {
        int place[kBatch][2];  // line, element
        bool whole[kBatch];    // it comes with the aligned 16 bytes of memory that cover it
        uint4 low[kBatch] = {}, high[kBatch] = {};
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
            const int granule = i + j * kThreads, line = granule / per_line;
            const int first = (granule - line * per_line) * kG;
            place[j][0] = line, place[j][1] = first;
            const T* const from_here = source(line, first);
            const int before = misalignment(from_here);
            whole[j] = from.step == 1 && line < valid_lines && lead + first >= before &&
                       first + kG + (before ? kG - before : 0) <= valid;
            if (!whole[j]) continue;
            load_global(low[j], from_here - before);
            if (before) load_global(high[j], from_here - before + kG);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
            const auto [line, first] = place[j];
            if (line >= lines) continue;
            const T* const at = source(line, first);
            uint4 bits;
            if (whole[j]) {
                bits = window(low[j], high[j], misalignment(at) * static_cast<int>(sizeof(T)));
            } else {
                T element[kG];
#pragma unroll
                for (int e = 0; e < kG; ++e) {
                    element[e] = line < valid_lines && first + e < valid ? at[e * from.step] : T{};
                }
                memcpy(&bits, element, sizeof(bits));
            }
            store_shared(tile.at(line, first), bits);
        }
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
        if (first >= 0 && first + kG <= length) {
            const int beyond = first % kG;  // the granule before it
            uint4 low, high{};
            load_shared(low, tile.at(line, first - beyond));
            if (beyond) load_shared(high, tile.at(line, first - beyond + kG));
            store_global(to + first, window(low, high, beyond * static_cast<int>(sizeof(T))));
        } else {
#pragma unroll
            for (int j = 0; j < kG; ++j) {
                if (first + j >= 0 && first + j < length) to[first + j] = *tile.at(line, first + j);
            }
        }
    }
}

}  // namespace mfops::cuda
