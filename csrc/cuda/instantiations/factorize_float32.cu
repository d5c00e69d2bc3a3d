#include "cuda/factorize/variants.cuh"

namespace mfops::cuda {

FactorVariants float32_factor_variants(bool transposed) {
    return compiled_factor_variants<Type::kFloat32>(transposed);
}

}  // namespace mfops::cuda
