// The kernels that find factors, of one type, one for each shape of tiles: what a plan chooses
// from.
#pragma once

#include <span>

#include "cuda/nmf_backward.cuh"
#include "cuda/resident.cuh"
#include "cuda/update.cuh"

namespace mfops::cuda {

// whole: all of Y stays in shared memory; two (backward alone): X and G' come, not one of them.
using ColumnBytes = size_t (*)(int rank, int64_t channels, int stages, bool whole, bool two);

template <class Params>
using Launch = void (*)(unsigned blocks, size_t shared_bytes, void* stream, const Params&);

struct RoundVariant {
    ColumnShape shape;
    ColumnBytes shared_bytes;
    Launch<RoundParams> launch;
};

struct NmfBackwardVariant {
    ColumnShape shape;
    ColumnBytes shared_bytes;
    Launch<NmfBackwardParams> launch;
};

struct FactorVariants {
    std::span<const RoundVariant> means, nmf, nmf_last;
    std::span<const NmfBackwardVariant> nmf_backward;
    Launch<GramParams> gram;
    Launch<ResidentParams> resident_em = nullptr;   // bfloat16
    Launch<ResidentParams> resident_nmf = nullptr;  // 16-bit types
};

// Each defined, and its kernels compiled, in a file of its own.
FactorVariants float32_factor_variants(bool transposed);
FactorVariants tf32_factor_variants(bool transposed);
FactorVariants bf16_factor_variants(bool transposed);
FactorVariants f16_factor_variants(bool transposed);

}  // namespace mfops::cuda
