// Tiles in shared memory: filled from global memory, and written back, 16 bytes at a time.
//
// Lines of odd length (N = 33 * 33) start anywhere within 16 bytes. `fill` brings the aligned
// granules, 16 bytes each, that cover a line, `align_lines` then moves the line to the beginning of
// the first of them, and `write_back` takes results from there to wherever lines start.
#pragma once

#include <cstring>

#include "cuda/common/primitives.cuh"
#include "cuda/common/types.h"

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

// Lines start on 16 bytes.
template <class T>
struct Tile {
    int start;  // elements from the beginning of the block's shared memory, so that the compiler
                // knows which memory every access goes to
    int pitch;  // elements from line to line, a multiple of a granule

    __device__ __forceinline__ T* at(int line, int element) const {
        return reinterpret_cast<T*>(shared_memory()) + start + line * pitch + element;
    }
    __device__ __forceinline__ T* granule(int line, int index) const {
        return at(line, index * kGranule<T>);
    }
};

// Elements by which a pointer lies beyond a 16-byte boundary.
template <class T>
__device__ __forceinline__ int misalignment(const T* pointer) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / sizeof(T)) & (kGranule<T> - 1);
}
// Whether all lines `stride` elements apart, of which one begins at `origin`, start on 16 bytes.
template <class T>
__device__ __forceinline__ bool on_granules(const T* origin, int64_t stride) {
    return (misalignment(origin) | (static_cast<int>(stride) & (kGranule<T> - 1))) == 0;
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

// f(granule in the tile, granule in memory, elements of the latter that lie before its line's, or
// before the one in the tile, whether that is a line's first) for all granules of whole lines,
// where each thread can stay in a column and finds every line at the same place within 16 bytes;
// else nothing, and false. Threads go on by additions: a division for each granule costs more than
// its copy.
template <int kThreads, class T, class Global, class F>
__device__ __forceinline__ bool in_columns(const Tile<T>& tile, Global* origin, int64_t stride,
                                           bool aligned, int lines, int length, F f) {
    constexpr int kG = kGranule<T>;
    const int whole = length / kG, lines_on = kThreads / whole;
    if (kThreads % whole != 0 || lines % lines_on != 0 || (!aligned && lines_on % kG != 0)) {
        return false;
    }
    const int line = threadIdx.x / whole, index = threadIdx.x % whole;
    T* shared = tile.granule(line, index);
    Global* global = origin + line * stride + index * kG;
    const int before = misalignment(global);
    global -= before;
#pragma unroll 2
    for (int i = 0; i < lines / lines_on; ++i) {
        f(shared, global, before, index == 0);
        shared += lines_on * tile.pitch, global += lines_on * stride;
    }
    return true;
}

// A thread's way through the granules of lines of any kind, in a tile and in memory.
template <int kThreads, class T, class Global>
struct Walk {
    int per_line;               // granules
    int lines_on, granules_on;  // from one of a thread's granules to its next
    int line, index;
    T* shared;
    Global* global;
    int64_t stride;  // of the lines in global memory
    int pitch;

    __device__ __forceinline__ Walk(const Tile<T>& tile, Global* origin, int64_t stride,
                                    int per_line)
        : Walk(tile, origin, no_hoist(stride), per_line, no_hoist(threadIdx.x)) {}
    __device__ __forceinline__ Walk(const Tile<T>& tile, Global* origin, int64_t stride,
                                    int per_line, int thread)
        : per_line(per_line),
          lines_on(kThreads / per_line),
          granules_on(kThreads % per_line),
          line(thread / per_line),
          index(thread % per_line),
          shared(tile.granule(line, index)),
          global(origin + line * stride + index * kGranule<T>),
          stride(stride),
          pitch(tile.pitch) {}

    __device__ __forceinline__ void next() {
        line += lines_on, index += granules_on;
        shared += lines_on * pitch + granules_on * kGranule<T>;
        global += lines_on * stride + granules_on * kGranule<T>;
        if (index >= per_line) {
            ++line, index -= per_line;
            shared += pitch - per_line * kGranule<T>;
            global += stride - per_line * kGranule<T>;
        }
    }
};

// Fills lines x length elements whose steps are not 1; those beyond line_end, end with zeros.
template <int kThreads, class T>
__device__ __forceinline__ void fill_by_element(const Tile<T>& tile, const Lines& from,
                                                const T* origin, int lines, int length,
                                                int line_end, int end) {
    const bool lines_innermost = no_hoist(from.line) < from.step;
#pragma unroll 1
    for (int i = no_hoist(threadIdx.x); i < lines * length; i += kThreads) {
        const int line = lines_innermost ? i % lines : i / length;
        const int element = lines_innermost ? i / lines : i % length;
        const bool inside = line < line_end && element < end;
        *tile.at(line, element) = inside ? origin[line * from.line + element * from.step] : T{};
    }
}

// Fills lines x length elements; those beyond valid_lines, valid_length with zeros. Unit steps come
// by cp.async (the caller commits, waits and settles), others element by element. A line may take
// one granule beyond `length`.
template <int kThreads, class T>
__device__ __forceinline__ void fill(const Tile<T>& tile, const Lines& from, const T* origin,
                                     int lines, int length, int64_t valid_lines,
                                     int64_t valid_length) {
    constexpr int kG = kGranule<T>, kSize = sizeof(T);
    const int line_end = within(valid_lines, lines), end = within(valid_length, length);
    if (from.step != 1) {
        return fill_by_element<kThreads>(tile, from, origin, lines, length, line_end, end);
    }
    const bool aligned = on_granules(origin, from.line);
    if (line_end == lines && end == length &&
        in_columns<kThreads>(tile, origin, from.line, aligned, lines, length,
                             [](T* to, const T* from, int, bool) { cp_async_16(to, from); })) {
        if (aligned) return;
#pragma unroll 1
        for (int line = no_hoist(threadIdx.x); line < lines;
             line += kThreads) {  // their last granules
            const T* const line_end = origin + line * no_hoist(from.line) + length;
            const int left = misalignment(line_end);
            cp_async_16(tile.granule(line, length / kG), line_end - left, left * kSize);
        }
        return;
    }
    Walk<kThreads, T, const T> at(tile, origin, from.line, length / kG + 1);
#pragma unroll 1
    for (; at.line < lines; at.next()) {
        const int before = misalignment(at.global);  // elements of the granule before the line's
        const int left = end + before - at.index * kG;
        const int count = at.line < line_end ? min(max(left, 0), kG) : 0;
        // Nothing is read where count is 0, but the address stays one of the tensor's.
        const T* source = count == 0 ? origin - misalignment(origin) : at.global - before;
        cp_async_16(at.shared, source, count * kSize);
    }
}

// The 16 bytes of shared memory from `at` on, wherever that is. Reads the four bytes after them.
template <class T>
__device__ __forceinline__ uint4 load_anywhere(const T* at) {
    const int beyond = sizeof(T) == 4 ? 0 : reinterpret_cast<uintptr_t>(at) & 2;  // bytes, of four
    const char* const from = reinterpret_cast<const char*>(at) - beyond;
    uint32_t w[5] = {};
#pragma unroll
    for (int i = 0; i < (sizeof(T) == 4 ? 4 : 5); ++i) load_shared(w[i], from + 4 * i);
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = (uint64_t{w[i + 1]} << 32 | w[i]) >> 8 * beyond;
    return {w[0], w[1], w[2], w[3]};
}

// Moves lines that `fill` brought, and that have arrived, to where they start on 16 bytes. Whether
// there was anything to do: the same for all threads, which then have to meet.
template <int kThreads, class T>
__device__ __forceinline__ bool align_lines(const Tile<T>& tile, const Lines& from, const T* origin,
                                            int lines, int length) {
    if (from.step != 1 || on_granules(origin, from.line)) return false;
    // A warp takes several lines at once or one part by part; all lanes read before one writes.
    const int whole = length / kGranule<T>, thread = no_hoist(threadIdx.x), lane = thread % 32;
    const int at_once = whole < 32 ? 32 / whole : 1, own_line = whole < 32 ? lane / whole : 0;
    const int own_granule = whole < 32 ? lane % whole : lane;
    // All of a thread's lines lie at the same place within 16 bytes.
    constexpr int kWarpsOfBlock = kThreads / 32;
    static_assert(kWarpsOfBlock % kGranule<T> == 0);
    int line = thread / 32 * at_once + own_line;
    const int offset = misalignment(origin + line * no_hoist(from.line));
    const T* from_line = tile.at(line, offset);
    const bool takes_part = own_line < at_once;
#pragma unroll 1
    for (int first = thread / 32 * at_once; first < lines; first += kWarpsOfBlock * at_once) {
#pragma unroll 1
        for (int begin = 0; begin < whole; begin += 32) {
            const int granule = begin + own_granule;
            const bool moves = takes_part && line < lines && granule < whole;
            uint4 bits;
            if (moves) bits = load_anywhere(from_line + granule * kGranule<T>);
            sync_warp();
            if (moves) store_shared(tile.granule(line, granule), bits);
        }
        line += kWarpsOfBlock * at_once;
        from_line += kWarpsOfBlock * at_once * tile.pitch;
    }
    return true;
}

// Writes the valid part of lines x length elements to dense lines `stride` elements apart.
template <int kThreads, class T>
__device__ __forceinline__ void write_back(const Tile<T>& tile, T* origin, int64_t stride,
                                           int lines, int length, int64_t valid_lines,
                                           int64_t valid_length) {
    constexpr int kG = kGranule<T>;
    const int line_end = within(valid_lines, lines), end = within(valid_length, length);
    const bool aligned = on_granules(origin, stride), full = line_end == lines && end == length;
    if (aligned && full &&
        in_columns<kThreads>(tile, origin, stride, true, lines, length,
                             [](const T* from, T* to, int, bool) {
                                 uint4 bits;
                                 load_shared(bits, from);
                                 store_global(to, bits);
                             })) {
        return;
    }
    // The granules of memory that are the tile's alone, then what is left at the lines' ends.
    if (aligned || !full ||
        !in_columns<kThreads>(tile, origin, no_hoist(stride), false, lines, length,
                              [](const T* from, T* to, int before, bool first) {
                                  if (first && before) return;
                                  store_global(to, load_anywhere(from - before));
                              })) {
        Walk<kThreads, T, T> at(tile, origin, stride, length / kG);
#pragma unroll 1
        for (; at.line < line_end; at.next()) {
            const int before = misalignment(at.global), first = at.index * kG - before;
            if (first < 0 || first + kG > end) continue;
            store_global(at.global - before, load_anywhere(at.shared - before));
        }
    }
    if (aligned && end % kG == 0) return;
    for (int i = no_hoist(threadIdx.x); i < 2 * line_end; i += kThreads) {
        const int line = i / 2;
        T* const to = origin + line * no_hoist(stride);
        const int before = misalignment(to), left = min((kG - before) % kG, end);
        const int right = max(end - (end + before) % kG, left);
        const int begin = i % 2 ? right : 0, stop = i % 2 ? end : left;
#pragma unroll
        for (int j = begin; j < begin + kG; ++j) {
            if (j < stop) to[j] = *tile.at(line, j);
        }
    }
}

// Neighbors on a line, (line, element) and (line, element + 1), element even.
template <class T>
struct Pair {
    T first, second;
};

template <class T>
__device__ __forceinline__ Pair<T> read_pair(const Tile<T>& tile, int line, int element) {
    const T* at = tile.at(line, element);
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

template <class T>
__device__ __forceinline__ void write_pair(const Tile<T>& tile, int line, int element, float first,
                                           float second) {
    T* at = tile.at(line, element);
    if constexpr (sizeof(T) == 2) {
        store_shared(at, from_float<T>(first).bits |
                             static_cast<uint32_t>(from_float<T>(second).bits) << 16);
    } else {
        store_shared(at, uint2{as_bits(first), as_bits(second)});
    }
}

}  // namespace mfops::cuda
