#include "cuda/common/pipeline.cuh"
#include "cuda/common/plan.h"

namespace mfops::cuda {
namespace {

struct MeanParams {
    const double* errors;
    int64_t count;
    double elements;
    float* mse;
};

// One block: the errors of all blocks, added in a fixed order.
__global__ void __launch_bounds__(kThreads) mean_kernel(const __grid_constant__ MeanParams params) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < params.count; i += kThreads) sum += params.errors[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *params.mse = static_cast<float>(sum / params.elements);
}

}  // namespace

void mean_of(const double* parts, int64_t count, double elements, float* mse, void* stream) {
    launch<mean_kernel>(
        1, kThreads, kWarps * sizeof(double), stream,
        MeanParams{.errors = parts, .count = count, .elements = elements, .mse = mse});
}

}  // namespace mfops::cuda
