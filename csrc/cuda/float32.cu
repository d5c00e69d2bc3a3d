#include "cuda/variants.cuh"

namespace mfops::cuda {

Variants float32_variants(bool transposed, bool aligned) {
    return compiled_variants<Type::kFloat32>(transposed, aligned);
}

}  // namespace mfops::cuda
