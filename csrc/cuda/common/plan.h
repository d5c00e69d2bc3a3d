// What plans have in common.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/common/types.h"

namespace mfops::cuda {

// What a block takes of shared memory besides what it asks for.
inline constexpr int kReservedBytes = 1024;
inline constexpr int kMaxStages = 4;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned checked_blocks(int64_t blocks) {
    if (blocks > 0x7fffffff) {
        throw std::runtime_error("mfops: x needs " + std::to_string(blocks) +
                                 " blocks, more than the 2^31 - 1 of a launch");
    }
    return static_cast<unsigned>(blocks);
}

[[noreturn]] inline void no_room(int rank, const Limits& limits) {
    throw std::runtime_error("mfops: rank " + std::to_string(rank) + " needs more than the " +
                             std::to_string(limits.shared_per_block) +
                             " bytes of shared memory that a block has on this GPU");
}

// The mean of a sum in `count` parts over `elements` elements, into `mse`.
void mean_of(const double* parts, int64_t count, double elements, float* mse, void* stream);

}  // namespace mfops::cuda
