#include "cuda/reconstruct/variants.cuh"

namespace mfops::cuda {

Variants tf32_variants(bool transposed, bool shared) {
    return compiled_variants<Type::kTf32>(transposed, shared);
}

}  // namespace mfops::cuda
