// What a call asks of the kernels, free of torch and of CUDA's headers.
//
// Memory decides the roles: X is a batch of matrices of rows by cols whose rows lie in memory one
// after the other, X' = A B with A (rows x rank) and B (rank x cols). Pixels innermost (contiguous
// features): rows are channels, A = Y, B = Z. Channels innermost (channels_last): rows are pixels,
// A = Z^T, B = Y^T, and the problem is called transposed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/common/types.h"

namespace mfops::cuda {

struct Problem {
    Type type = Type::kFloat32;
    bool transposed = false;
    int64_t batch = 0, rows = 0, cols = 0;
    int rank = 0;
    Lines x;     // lines are rows
    Lines a, b;  // lines are channels for the factor Y, bases for the factor Z
    bool a_per_image = false, b_per_image = false;  // both false: one product for all images
};

// How a kernel's work is dealt out to its blocks. A block owns one strip (`own` rows, or columns,
// of the matrix) and goes through a range of tiles across it, for a chunk of the images.
struct Work {
    int strips = 0;           // 0: nothing to do
    int tiles = 0;            // across a strip
    int ranges = 1;           // of tiles
    int chunks = 1;           // of images
    int interleave = 1;       // order of the strips: the first of so many parts, then the second..
    int strips_per_part = 0;  // rounded up: blocks of strips beyond the last do nothing

    int64_t blocks() const {
        return static_cast<int64_t>(interleave) * strips_per_part * ranges * chunks;
    }
};

struct ForwardPlan {
    int shape = 0;  // index into the table of tile shapes
    int stages = 1;
    Work work;
    size_t shared_bytes = 0;
    size_t workspace_bytes = 0;
};

struct BackwardPlan {
    int shape = 0;
    int stages = 1;
    Work rows, cols;          // blocks that own rows (dA, and dX) and blocks that own columns (dB)
    bool cols_first = false;  // which of them start first
    bool x_by_rows = false, x_by_cols = false;  // which of them write dX
    size_t shared_bytes = 0;
    size_t workspace_bytes = 0;
};

// What the backward pass is given and asked for besides the problem.
struct Gradients {
    Lines grad_x_hat;  // lines are rows; data null: none
    bool grad_x_hat_per_image = false;
    const float* grad_mse = nullptr;  // on the device; null: none
    // Results, dense, in the memory order of X, Y, Z; null: not wanted.
    void* grad_x = nullptr;
    void* grad_a = nullptr;
    void* grad_b = nullptr;
};

ForwardPlan plan_forward(const Problem&, const Limits&);

// X' into `x_hat` (dense, in X's memory order, one matrix where the factors are shared; null: not
// wanted), the mean squared error into `mse`; `workspace` holds plan.workspace_bytes.
void launch_forward(const Problem&, const ForwardPlan&, void* x_hat, float* mse, void* workspace,
                    void* stream);

BackwardPlan plan_backward(const Problem&, const Limits&, const Gradients&);

void launch_backward(const Problem&, const BackwardPlan&, const Gradients&, void* workspace,
                     void* stream);

}  // namespace mfops::cuda
