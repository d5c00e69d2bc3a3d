#include "cuda/variants.cuh"

namespace mfops::cuda {

Variants tf32_variants(bool transposed, bool aligned) {
    return compiled_variants<Type::kTf32>(transposed, aligned);
}

}  // namespace mfops::cuda
