// What the forward and the backward kernel share: the tables of tile shapes, where tiles lie in
// shared memory, and how a block goes through its work.
#pragma once

#include "cuda/common/pipeline.cuh"
#include "cuda/common/product.cuh"
#include "cuda/reconstruct/problem.h"

namespace mfops::cuda {

// A block owns `own` rows (or columns) and streams tiles of `stream` columns (or rows).
struct TileShape {
    int own, stream, max_rank;
    int warps;   // of a block
    int blocks;  // per multiprocessor: what its registers are cut for
};

// The first shape whose rank is large enough and that fits into shared memory in two stages is
// taken, else the first that fits in one. Reasons: a streamed factor is read again by every strip,
// rank / own of its elements for each of X's, so strips are as wide as registers and shared memory
// allow; 64 16-bit or 32 float32 elements of a line are one whole 128-byte line of the L2. Where
// one block fills a multiprocessor it has sixteen warps, so that a scheduler has four to choose
// from, but for 128 bases: sixteen warps have registers for strips of 64, with which they took 1.6
// times as long on an H200. Small strips last: GPUs of compute capability 8.6 and 8.9 have 99 KiB
// for a block, and rank 256 has to fit there too.
template <size_t kElementBytes, bool kShared>
struct Shapes;
template <>
struct Shapes<2, false> {
    static constexpr TileShape kForward[] = {{128, 64, 256, 8, 2}, {64, 64, 256, 8, 2}};
    static constexpr TileShape kBackward[] = {
        {128, 64, 64, 16, 1}, {128, 64, 128, 8, 1}, {64, 64, 256, 16, 1}};
};
// Of shared factors D is summed over the images, in registers that the shape for 128 bases lacks.
template <>
struct Shapes<2, true> : Shapes<2, false> {
    static constexpr TileShape kBackward[] = {{128, 64, 64, 16, 1}, {64, 64, 256, 16, 1}};
};
template <bool kShared>
struct Shapes<4, kShared> {
    static constexpr TileShape kForward[] = {{64, 64, 256, 8, 2}, {32, 32, 256, 8, 2}};
    static constexpr TileShape kBackward[] = {
        {64, 32, 64, 16, 1}, {64, 32, 128, 8, 1}, {32, 32, 256, 8, 1}};
};

// A tile of X, or of what is as large. The padding takes the granule that a line may have besides,
// and puts the lines that a warp reads together into different banks.
template <class T, int kRows, int kCols, int kThreads>
struct FeatureTile {
    static constexpr int kPitch = kCols + 16 / sizeof(T);
    static constexpr int kElements = kRows * kPitch;

    __device__ __forceinline__ static Tile<T> tile(int start) { return {start, kPitch}; }
    // `rows` x `cols` of it exist.
    __device__ __forceinline__ static void load(int start, const Lines& from, const T* origin,
                                                int64_t rows, int64_t cols) {
        fill<kThreads>(tile(start), from, origin, kRows, kCols, rows, cols);
    }
    __device__ __forceinline__ static bool align_lines(int start, const Lines& from,
                                                       const T* origin) {
        return cuda::align_lines<kThreads>(tile(start), from, origin, kRows, kCols);
    }
};

// A factor's part for kExtent rows (or columns), all bases. kByK: its lines run along the bases.
template <class T, bool kByK, int kExtent, int kThreads>
struct FactorTile {
    static constexpr int kPadding = kByK ? 16 / sizeof(T) : 8;

    __host__ __device__ static constexpr int lines(int padded) { return kByK ? kExtent : padded; }
    __host__ __device__ static constexpr int length(int padded) { return kByK ? padded : kExtent; }
    __host__ __device__ static constexpr int elements(int padded) {
        return lines(padded) * (length(padded) + kPadding);
    }

    __device__ __forceinline__ static const T* origin(const Lines& from, int64_t image,
                                                      int64_t first) {
        return origin_of<T>(from, image, kByK ? first : 0, kByK ? 0 : first);
    }
    __device__ __forceinline__ static Tile<T> tile(int start, int padded) {
        return {start, length(padded) + kPadding};
    }
    // `valid` of the kExtent rows exist.
    __device__ __forceinline__ static void load(int start, int rank, const Lines& from,
                                                int64_t image, int64_t first, int64_t valid) {
        const int padded = padded_16(rank);
        fill<kThreads>(tile(start, padded), from, origin(from, image, first), lines(padded),
                       length(padded), kByK ? valid : rank, kByK ? rank : valid);
    }
    __device__ __forceinline__ static bool align_lines(int start, int rank, const Lines& from,
                                                       int64_t image, int64_t first) {
        const int padded = padded_16(rank);
        return cuda::align_lines<kThreads>(tile(start, padded), from, origin(from, image, first),
                                           lines(padded), length(padded));
    }
};

// The tiles of one step: kRows x kCols of X and the factors' parts for them.
template <Type kType, bool kTransposed, int kRows, int kCols, int kWarps>
struct Tiles {
    using T = Element<kType>;
    using X = FeatureTile<T, kRows, kCols, 32 * kWarps>;
    using A = FactorTile<T, !kTransposed, kRows, 32 * kWarps>;
    using B = FactorTile<T, kTransposed, kCols, 32 * kWarps>;
};

// What one block does of the work.
struct Item {
    int strip;
    int first_tile, tiles;
    int first_image, images;
    int partial;  // which of the partial sums of a strip's result it leaves

    __device__ __forceinline__ int steps() const { return tiles * images; }
};

__device__ __forceinline__ Item item_of(const Work& work, int64_t batch, unsigned index) {
    const int chunk = index % work.chunks;
    index /= work.chunks;
    const int range = index % work.ranges;
    index /= work.ranges;
    const int strip = index % work.interleave * work.strips_per_part + index / work.interleave;
    const auto part = [](int64_t n, int i, int parts) { return static_cast<int>(n * i / parts); };
    const int first_tile = part(work.tiles, range, work.ranges);
    const int first_image = part(batch, chunk, work.chunks);
    return {.strip = strip,
            .first_tile = first_tile,
            .tiles = part(work.tiles, range + 1, work.ranges) - first_tile,
            .first_image = first_image,
            .images = part(batch, chunk + 1, work.chunks) - first_image,
            .partial = chunk * work.ranges + range};
}

// One step: a tile of one image. Of shared factors, all images of a tile come one after another,
// so that its product is computed once.
struct Step {
    int tile, image;
    bool first, last;    // of the images that share the tile's product
    int slot, streamed;  // the stages that hold X's tile and the streamed factor's
};

// Goes through an item's steps by additions: divisions by variables cost more.
template <bool kShared>
struct Steps {
    const Item& item;
    int stages;
    int tile = 0, image = 0, streamed = 0;

    __device__ __forceinline__ Step next(int slot) {
        const bool first = !kShared || image == 0, last = !kShared || image == item.images - 1;
        const Step step{.tile = item.first_tile + tile,
                        .image = item.first_image + image,
                        .first = first,
                        .last = last,
                        .slot = slot,
                        .streamed = kShared ? streamed : slot};
        if (kShared) {
            if (last) streamed = next_slot(streamed, stages);
            image = last ? 0 : image + 1, tile += last;
        } else if (++tile == item.tiles) {
            tile = 0, ++image;
        }
        return step;
    }
};

}  // namespace mfops::cuda
