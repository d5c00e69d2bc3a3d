#include "cuda/factorize/variants.cuh"

namespace mfops::cuda {

FactorVariants f16_factor_variants(bool transposed) {
    return compiled_factor_variants<Type::kF16>(transposed);
}

}  // namespace mfops::cuda
