#include "cuda/reconstruct/variants.cuh"

namespace mfops::cuda {

Variants f16_variants(bool transposed, bool shared) {
    return compiled_variants<Type::kF16>(transposed, shared);
}

}  // namespace mfops::cuda
