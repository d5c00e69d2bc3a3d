#include "cuda/variants.cuh"

namespace mfops::cuda {

Variants f16_variants(bool transposed, bool aligned) {
    return compiled_variants<Type::kF16>(transposed, aligned);
}

}  // namespace mfops::cuda
