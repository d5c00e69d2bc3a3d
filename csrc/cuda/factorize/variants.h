// The kernels that find factors, of one type, one for each shape of tiles: what a plan chooses
// from.
#pragma once

#include <span>

#include "cuda/common/variants.cuh"
#include "cuda/factorize/nmf_backward.cuh"
#include "cuda/factorize/persistent.cuh"
#include "cuda/factorize/stream_partials.cuh"
#include "cuda/factorize/stream_round.cuh"
#include "cuda/factorize/update.cuh"

namespace mfops::cuda {

struct RoundVariant {
    ColumnShape shape;
    size_t (*shared_bytes)(int rank, int64_t channels, int stages);
    Launch<RoundParams> launch;
};

struct PartialsVariant {
    ColumnShape shape;
    size_t (*shared_bytes)(int set, int stages);
    Launch<PartialsParams> launch;
};

struct NmfBackwardVariant {
    ColumnShape shape;
    // whole: all of Y stays in shared memory; two: X and G' come, not one of them.
    size_t (*shared_bytes)(int rank, int64_t channels, int stages, bool whole, bool two);
    Launch<NmfBackwardParams> launch;
};

// What a family of methods has, each for several shapes of tiles.
struct FamilyVariants {
    std::span<const RoundVariant> rounds, coefficients;
    std::span<const PartialsVariant> partials;
    std::span<const RoundVariant> last;  // nmf
};

struct FactorVariants {
    FamilyVariants means, nmf;
    std::span<const NmfBackwardVariant> nmf_backward;
    Launch<GramParams> gram;
    Launch<PersistentParams> persistent_em = nullptr;   // bfloat16
    Launch<PersistentParams> persistent_nmf = nullptr;  // 16-bit types
};

// Each defined, and its kernels compiled, in a file of its own.
FactorVariants float32_factor_variants(bool transposed);
FactorVariants tf32_factor_variants(bool transposed);
FactorVariants bf16_factor_variants(bool transposed);
FactorVariants f16_factor_variants(bool transposed);

}  // namespace mfops::cuda
