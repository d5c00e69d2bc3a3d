#include "cuda/variants.cuh"

namespace mfops::cuda {

Variants bf16_variants(bool transposed, bool aligned) {
    return compiled_variants<Type::kBf16>(transposed, aligned);
}

}  // namespace mfops::cuda
