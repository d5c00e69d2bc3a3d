// How a block goes through its tiles: loads run ahead of the work on what has arrived.
#pragma once

#include "cuda/common/primitives.cuh"

namespace mfops::cuda {

inline constexpr int kWarps = 8, kThreads = 32 * kWarps;

__device__ __forceinline__ int next_slot(int slot, int stages) {
    return slot + 1 == stages ? 0 : slot + 1;
}

__device__ __forceinline__ void wait_for_copies(int pending) {
    switch (pending) {
        case 0:
            return cp_async_wait<0>();
        case 1:
            return cp_async_wait<1>();
        default:
            return cp_async_wait<2>();
    }
}

// Runs load(step, slot) for every step, `stages` - 1 steps ahead, and compute(step, slot) on what
// has arrived; slot = step % stages. A stage is filled again only after every thread has left the
// step that used it.
template <class Load, class Compute>
__device__ __forceinline__ void pipeline(int steps, int stages, Load load, Compute compute) {
    const int ahead = stages - 1;
    int slot = 0;
#pragma unroll 1
    for (int step = -ahead; step < steps; ++step) {
        if (step >= 0) {
            if (ahead > 0) wait_for_copies(ahead - 1);
            __syncthreads();
        }
        // The stage that was computed on last; before the first step they are filled in order.
        const int free = step < 0 ? step + ahead : slot == 0 ? ahead : slot - 1;
        if (step + ahead < steps) load(step + ahead, free);
        cp_async_commit();
        if (step < 0) continue;
        if (ahead == 0) {
            wait_for_copies(0);
            __syncthreads();
        }
        compute(step, slot);
        slot = next_slot(slot, stages);
    }
}

// The block's sum of `value`, added in a fixed order, in thread 0. All shared memory is free.
template <int kWarpsOfBlock = kWarps>
__device__ __forceinline__ double block_sum(double value) {
    for (int offset = 16; offset > 0; offset /= 2) value += shuffle_down(value, offset);
    double* sums = reinterpret_cast<double*>(shared_memory());
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x != 0) return 0;
    double total = 0;
    for (int warp = 0; warp < kWarpsOfBlock; ++warp) total += sums[warp];
    return total;
}

}  // namespace mfops::cuda
