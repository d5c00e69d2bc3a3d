// What the kernels that go through X tile by tile of pixels share: the tables of tile shapes, a
// tile of X, and the work of a block.
#pragma once

#include "cuda/common/pipeline.cuh"
#include "cuda/common/product.cuh"
#include "cuda/factorize/problem.h"

namespace mfops::cuda {

// A block takes `own` channels of a tile at a time, or all that there are, and up to `rank` bases.
struct ColumnShape {
    int own, rank, pixels;
};

// Of each table the first shape is taken that the problem and the GPU's shared memory have room
// for. Reasons:
// kRound: all channels of a tile at once, whose X Z^T takes own x rank accumulators, 128 registers
// of a thread at most.
// kCoefficients: Y passes by with each tile, rank / pixels of its bytes for each of X's.
// kPartials: X passes by once for every 64 bases, Z once for every `own` channels; Z Z^T is
// computed as if Z were channels, up to kMaxRank of them. kBackward: every group computes Y^T D
// anew, but a second stage counts for more than large groups. Small ones last, for GPUs with 99 KiB
// for a block.
template <size_t kElementBytes>
struct ColumnShapes;
template <>
struct ColumnShapes<2> {
    static constexpr ColumnShape kRound[] = {{256, 64, 32}, {512, 64, 32}};
    static constexpr ColumnShape kCoefficients[] = {{128, 64, 64}, {32, 256, 32}};
    static constexpr ColumnShape kPartials[] = {{256, 64, 64}};
    static constexpr ColumnShape kWidePartials[] = {{256, 64, 32}};  // Z in float32
    static constexpr ColumnShape kBackward[] = {{256, 64, 32}, {128, 64, 32}, {128, 256, 16}};
};
template <>
struct ColumnShapes<4> {
    static constexpr ColumnShape kRound[] = {{128, 64, 32}, {256, 64, 32}};
    static constexpr ColumnShape kCoefficients[] = {{64, 64, 64}, {16, 256, 32}};
    static constexpr ColumnShape kPartials[] = {{256, 64, 32}};
    static constexpr ColumnShape kBackward[] = {{128, 64, 32}, {64, 64, 32}, {64, 256, 16}};
};

// `own` channels of a tile of X, or of what is as large.
template <class T, bool kTransposed, int kOwn, int kPixels>
struct ChunkTile {
    static constexpr int kLength = kTransposed ? kOwn : kPixels;
    static constexpr int kPitch = kLength + kGranule<T>;
    static constexpr int kElements = (kTransposed ? kPixels : kOwn) * kPitch;

    __device__ __forceinline__ static Tile<T> tile(int start) { return {start, kPitch}; }
    __device__ __forceinline__ static const T* origin(const Lines& from, int64_t image,
                                                      int64_t channel, int64_t pixel) {
        return origin_of<T>(from, image, kTransposed ? pixel : channel,
                            kTransposed ? channel : pixel);
    }
    // Of `channels` channels from `channel` on, and zeros up to a multiple of 16.
    __device__ __forceinline__ static void load(int start, const Lines& from, int64_t image,
                                                int64_t channel, int channels, int64_t pixel,
                                                int64_t pixels) {
        const T* const first = origin(from, image, channel, pixel);
        const int padded = padded_16(channels);
        fill<kThreads>(tile(start), from, first, kTransposed ? kPixels : padded,
                       kTransposed ? padded : kPixels, kTransposed ? pixels - pixel : channels,
                       kTransposed ? channels : pixels - pixel);
    }
    __device__ __forceinline__ static bool align_lines(int start, const Lines& from, int64_t image,
                                                       int64_t channel, int channels,
                                                       int64_t pixel) {
        const int padded = padded_16(channels);
        return cuda::align_lines<kThreads>(tile(start), from, origin(from, image, channel, pixel),
                                           kTransposed ? kPixels : padded,
                                           kTransposed ? padded : kPixels);
    }
    // Writes the tile to the dense result `to` in X's memory order.
    __device__ __forceinline__ static void store(int start, void* to, const FactorProblem& p,
                                                 int64_t image, int64_t channel, int channels,
                                                 int64_t pixel) {
        const Tile<T> from = tile(start);
        T* const first = static_cast<T*>(to) + image * p.channels * p.pixels;
        if constexpr (kTransposed) {
            write_back<kThreads>(from, first + pixel * p.channels + channel, p.channels, kPixels,
                                 kOwn, p.pixels - pixel, channels);
        } else {
            write_back<kThreads>(from, first + channel * p.pixels + pixel, p.pixels, kOwn, kPixels,
                                 channels, p.pixels - pixel);
        }
    }
};

// Copies `lines` whole lines of `length` elements, both padded, that lie `apart` elements from each
// other in dense memory on 16 bytes.
template <class T>
__device__ __forceinline__ void load_dense(const Tile<T>& tile, const T* from, int lines,
                                           int length, int valid_lines, int apart = 0) {
    fill<kThreads>(tile, Lines{from, 0, length + apart, 1}, from, lines, length, valid_lines,
                   length);
}

// The other way round, line after line.
template <class T>
__device__ __forceinline__ void store_dense(const Tile<T>& tile, T* to, int lines, int length) {
    write_back<kThreads>(tile, to, length, lines, length, lines, length);
}

// Y, line by line as a matrix of channels x bases; so are Z^T and Y^T Y.
template <class T>
__host__ __device__ constexpr int base_pitch(int padded) {
    return padded + 16 / static_cast<int>(sizeof(T));
}

// What one block does of the work.
struct ColumnItem {
    int group, range, first_tile, tiles;
    int64_t image;
};

// `beside` groups of a range lie side by side in the launch; further ones follow all images.
__device__ __forceinline__ ColumnItem item_of(const ColumnWork& work, int64_t batch, int beside,
                                              unsigned index) {
    ColumnItem item;
    item.group = index % beside;
    index /= beside;
    item.range = index % work.ranges;
    index /= work.ranges;
    item.image = index % batch;
    item.group += static_cast<int>(index / batch) * beside;
    const auto part = [&](int64_t i) { return static_cast<int>(work.tiles * i / work.ranges); };
    item.first_tile = part(item.range);
    item.tiles = part(item.range + 1) - item.first_tile;
    return item;
}

}  // namespace mfops::cuda
