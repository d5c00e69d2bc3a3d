// Tiles in shared memory: filled from global memory, and written back, 16 bytes at a time.
//
// Lines of odd length (N = 33 * 33) start anywhere within 16 bytes. A tile then holds the aligned
// 16-byte granules that cover each line, and element 0 of a line sits `offset(line)` elements into
// them; nothing is shifted on the way, and only the fragments' loads know.
#pragma once

#include <cstring>

#include "cuda/primitives.cuh"
#include "cuda/problem.h"

namespace mfops::cuda {

__device__ __forceinline__ float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}
__device__ __forceinline__ uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

template <class T>
inline constexpr int kGranule = 16 / sizeof(T);  // elements in 16 bytes

// kAligned: every line starts on 16 bytes, known when compiling.
template <class T, bool kAligned>
struct Tile {
    int start;                  // elements from the beginning of the block's shared memory, so that
                                // the compiler knows which memory every access goes to
    int pitch;                  // elements from line to line, a multiple of a granule
    int shift = 0, growth = 0;  // offset of line 0, and what every further line adds to it

    __device__ __forceinline__ bool aligned() const { return kAligned || (shift | growth) == 0; }
    __device__ __forceinline__ int offset(int line) const {
        return kAligned ? 0 : (shift + line * growth) & (kGranule<T> - 1);
    }
    // The 16 bytes that hold the line's first elements are granule 0.
    __device__ __forceinline__ T* granule(int line, int index) const {
        return reinterpret_cast<T*>(shared_memory()) + start + line * pitch + index * kGranule<T>;
    }
    __device__ __forceinline__ T* at(int line, int element) const {
        return granule(line, 0) + offset(line) + element;
    }
};

// Elements by which a pointer lies beyond a 16-byte boundary.
template <class T>
__device__ __forceinline__ int misalignment(const T* pointer) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / sizeof(T)) & (kGranule<T> - 1);
}

// The tile as `fill` leaves it: `origin` is its element (0, 0) in global memory.
template <bool kAligned, class T>
__device__ __forceinline__ Tile<T, kAligned> tile_of(int start, int pitch, const Lines& from,
                                                     const T* origin) {
    if (kAligned || from.step != 1) return {start, pitch};
    return {start, pitch, misalignment(origin), static_cast<int>(from.line) & (kGranule<T> - 1)};
}

template <class T>
__device__ __forceinline__ const T* origin_of(const Lines& from, int64_t image, int64_t line,
                                              int64_t element) {
    return static_cast<const T*>(from.data) + image * from.batch + line * from.line +
           element * from.step;
}

// How many of a tile's `extent` lines or elements exist, where `left` are left.
__device__ __forceinline__ int within(int64_t left, int extent) {
    return left < extent ? static_cast<int>(left) : extent;
}

// Fills lines x length elements; those beyond valid_lines, valid_length with zeros. Unit steps come
// by cp.async (the caller commits and waits), others element by element.
template <int kThreads, class T, bool kAligned>
__device__ __forceinline__ void fill(const Tile<T, kAligned>& tile, const Lines& from,
                                     const T* origin, int lines, int length, int64_t valid_lines,
                                     int64_t valid_length) {
    constexpr int kG = kGranule<T>;
    const int line_end = within(valid_lines, lines), end = within(valid_length, length);
    if (kAligned || from.step == 1) {
        const int whole = length / kG, per_line = tile.aligned() ? whole : whole + 1;
#pragma unroll 1
        for (int i = threadIdx.x; i < lines * per_line; i += kThreads) {
            // Two divisions by what mostly are constants, not one by a variable.
            const int line = tile.aligned() ? i / whole : i / (whole + 1);
            const int granule = i - line * per_line;
            const int first = granule * kG - tile.offset(line);  // below 0: the line before
            const int count = line < line_end ? min(max(end - first, 0), kG) : 0;
            // Nothing is read where count is 0, but the address stays one of the tensor's.
            const T* source =
                count == 0 ? origin - misalignment(origin) : origin + line * from.line + first;
            cp_async_16(tile.granule(line, granule), source, count * static_cast<int>(sizeof(T)));
        }
        return;
    }
    const bool lines_innermost = from.line < from.step;
#pragma unroll 4
    for (int i = threadIdx.x; i < lines * length; i += kThreads) {
        const int line = lines_innermost ? i % lines : i / length;
        const int element = lines_innermost ? i / lines : i % length;
        const bool inside = line < line_end && element < end;
        *tile.at(line, element) = inside ? origin[line * from.line + element * from.step] : T{};
    }
}

// Writes the tile's valid part to dense lines `line` elements apart.
template <int kThreads, class T, bool kAligned>
__device__ __forceinline__ void write_back(const Tile<T, kAligned>& tile, T* origin,
                                           int64_t line_stride, int lines, int length,
                                           int64_t valid_lines, int64_t valid_length) {
    constexpr int kG = kGranule<T>;
    const Tile<T, kAligned> out{tile.start, tile.pitch, misalignment(origin),
                                static_cast<int>(line_stride) & (kG - 1)};
    const bool same_offsets = kAligned || (out.shift == tile.shift && out.growth == tile.growth);
    const int whole = length / kG, per_line = out.aligned() ? whole : whole + 1;
    // The last granule of an unaligned line reaches into the next tile, which is not ours to write.
    const int line_end = within(valid_lines, lines), end = within(valid_length, length);
#pragma unroll 1
    for (int i = threadIdx.x; i < lines * per_line; i += kThreads) {
        const int line = out.aligned() ? i / whole : i / (whole + 1);
        if (line >= line_end) break;
        const int first = (i - line * per_line) * kG - out.offset(line);
        T* to = origin + line * line_stride + first;
        if (first >= 0 && first + kG <= end) {
            uint4 bits;
            if (same_offsets) {
                load_shared(bits, tile.at(line, first));
            } else {
                T element[kG];
#pragma unroll
                for (int j = 0; j < kG; ++j) element[j] = *tile.at(line, first + j);
                memcpy(&bits, element, sizeof(bits));
            }
            store_global(to, bits);
        } else {
#pragma unroll
            for (int j = 0; j < kG; ++j) {
                if (first + j >= 0 && first + j < end) to[j] = *tile.at(line, first + j);
            }
        }
    }
}

// Neighbours on a line, (line, element) and (line, element + 1), element even.
template <class T>
struct Pair {
    T first, second;
};

template <class T, bool kAligned>
__device__ __forceinline__ Pair<T> read_pair(const Tile<T, kAligned>& tile, int line, int element) {
    const T* at = tile.at(line, element);
    if (!tile.aligned()) return {at[0], at[1]};
    if constexpr (sizeof(T) == 2) {
        uint32_t bits;
        load_shared(bits, at);
        return {{static_cast<uint16_t>(bits)}, {static_cast<uint16_t>(bits >> 16)}};
    } else {
        uint2 bits;
        load_shared(bits, at);
        return {as_float(bits.x), as_float(bits.y)};
    }
}

template <class T, bool kAligned>
__device__ __forceinline__ void write_pair(const Tile<T, kAligned>& tile, int line, int element,
                                           float first, float second) {
    T* at = tile.at(line, element);
    const Pair<T> pair{from_float<T>(first), from_float<T>(second)};
    if (!tile.aligned()) {
        at[0] = pair.first;
        at[1] = pair.second;
    } else if constexpr (sizeof(T) == 2) {
        store_shared(at, pair.first.bits | static_cast<uint32_t>(pair.second.bits) << 16);
    } else {
        store_shared(at, uint2{as_bits(pair.first), as_bits(pair.second)});
    }
}

}  // namespace mfops::cuda
