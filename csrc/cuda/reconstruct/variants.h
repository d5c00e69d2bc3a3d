// The kernels of one type, one for each shape of tiles: what a plan chooses from.
#pragma once

#include <span>

#include "cuda/reconstruct/backward.cuh"
#include "cuda/reconstruct/forward.cuh"

namespace mfops::cuda {

struct ForwardVariant {
    TileShape shape;
    size_t (*shared_bytes)(int rank, int stages);
    void (*launch)(unsigned blocks, size_t shared_bytes, void* stream, const ForwardParams&);
};

struct BackwardVariant {
    TileShape shape;
    size_t (*shared_bytes)(int rank, bool grad_x_hat, int stages);
    void (*launch)(unsigned blocks, size_t shared_bytes, void* stream, const BackwardParams&);
};

struct Variants {
    std::span<const ForwardVariant> forward;
    std::span<const BackwardVariant> backward;
};

// Each defined, and its kernels compiled, in a file of its own.
Variants float32_variants(bool transposed, bool shared);
Variants tf32_variants(bool transposed, bool shared);
Variants bf16_variants(bool transposed, bool shared);
Variants f16_variants(bool transposed, bool shared);

}  // namespace mfops::cuda
