// Element types, matrices in global memory and what a device offers, free of torch and of CUDA's
// headers.
#pragma once

#include <cstdint>

namespace mfops::cuda {

inline constexpr int kMaxRank = 256;

// Element type of X, A, B and how their products are computed.
enum class Type { kFloat32, kTf32, kBf16, kF16 };

constexpr int element_bytes(Type type) { return type == Type::kBf16 || type == Type::kF16 ? 2 : 4; }

// Matrices in global memory, one for each image: element e of line l of image b is
// data[b * batch + l * line + e * step]. A batch stride of 0: one matrix for all images.
struct Lines {
    const void* data = nullptr;
    int64_t batch = 0, line = 0, step = 0;
};

// Clusters of the persistent kernel: so many blocks of so many threads.
inline constexpr int kClusterBlocks = 8, kClusterWarps = 16, kClusterThreads = 32 * kClusterWarps;

// What the kernels of a device may use.
struct Limits {
    int multiprocessors = 0;
    int shared_per_block = 0, shared_per_multiprocessor = 0;  // bytes
    // Clusters that run side by side, each block with all the shared memory it may have; 0: none.
    int clusters = 0;
};

}  // namespace mfops::cuda
