#include "cuda/reconstruct/variants.cuh"

namespace mfops::cuda {

Variants bf16_variants(bool transposed, bool shared) {
    return compiled_variants<Type::kBf16>(transposed, shared);
}

}  // namespace mfops::cuda
