// The kernels of one type, one for each shape of tiles: what a plan chooses from.
#pragma once

#include <span>

#include "cuda/common/variants.cuh"
#include "cuda/reconstruct/backward.cuh"
#include "cuda/reconstruct/forward.cuh"

namespace mfops::cuda {

struct ForwardVariant {
    TileShape shape;
    size_t (*shared_bytes)(int rank, int stages);
    Launch<ForwardParams> launch;
};

struct BackwardVariant {
    TileShape shape;
    size_t (*shared_bytes)(int rank, bool grad_x_hat, int stages);
    Launch<BackwardParams> launch;
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
