#include "cuda/factorize/variants.cuh"

namespace mfops::cuda {

FactorVariants tf32_factor_variants(bool transposed) {
    return compiled_factor_variants<Type::kTf32>(transposed);
}

}  // namespace mfops::cuda
