#include "cuda/factorize/variants.cuh"

namespace mfops::cuda {

FactorVariants bf16_factor_variants(bool transposed) {
    return compiled_factor_variants<Type::kBf16>(transposed);
}

}  // namespace mfops::cuda
