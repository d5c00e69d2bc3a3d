#include "cuda/reconstruct/variants.cuh"

namespace mfops::cuda {

Variants float32_variants(bool transposed, bool shared) {
    return compiled_variants<Type::kFloat32>(transposed, shared);
}

}  // namespace mfops::cuda
