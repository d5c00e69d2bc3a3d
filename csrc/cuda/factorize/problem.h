// What a call that finds factors on each image asks of the kernels, free of torch and of CUDA's
// headers. Formulas: mfops/methods, mfops/reference.py.
//
// Unlike Problem's roles these do not depend on memory: X is (channels x pixels), Y (channels x
// rank), Z (rank x pixels). Inside, Y is kept as lines of bases, one for each channel, Z as lines
// of bases, one for each pixel, both in X's type and padded with zeros to whole 16s of bases.
#pragma once

#include "cuda/reconstruct/problem.h"

namespace mfops::cuda {

enum class Method { kEm, kVq, kCd, kNmf };

struct FactorProblem {
    Type type = Type::kFloat32;
    bool transposed = false;  // channels innermost
    int64_t batch = 0, channels = 0, pixels = 0;
    int rank = 0;
    Lines x;  // lines are channels, or pixels where transposed
};

// How blocks share the tiles of pixels of all images. What is computed of a tile is shared by
// `groups` blocks.
struct ColumnWork {
    int tiles = 0;   // of an image
    int ranges = 1;  // of tiles
    int groups = 1;
    int chunks = 1;  // of channels

    int64_t blocks(int64_t batch) const { return batch * ranges * groups; }
};

struct ColumnPlan {
    int shape = 0;       // index into the table of tile shapes
    int stages = 0;      // 0: there is no such plan
    bool whole = false;  // nmf's gradient: all of Y lies in shared memory, for all tiles
    ColumnWork work;
    size_t shared_bytes = 0;
};

struct FactorPlan {
    Method method = Method::kEm;
    int steps = 0;
    float inverse_temperature = 0;  // of vq and cd
    bool reconstruct = false;       // not the rounds alone
    int padded = 0;                 // K in whole 16s
    int span = 0;  // > 0: one launch for all rounds, a block keeping so many columns of X
    size_t shared_bytes = 0;
    bool split = false;         // a round is two kernels: Z, then its products
    ColumnPlan round, last;     // split: those that find Z
    ColumnPlan shares;          // split: those that multiply by it
    int set = 0;                // of the bases, that a block of them takes
    bool features = false;      // X' and its error are computed too
    int slice = 0, slices = 0;  // channels whose bases one block updates, and their number
    // Bytes from the beginning of the workspace.
    size_t squares = 0, factors = 0, shares_at = 0, sums = 0, gram = 0, coefficients = 0,
           errors = 0;
    size_t workspace_bytes = 0;
};

// Dense results. z, z_scale (B, K, N); y (B, C, K) in float32; null: not wanted.
struct Factors {
    float* y = nullptr;
    void* bases = nullptr;  // Y in X's type, (B, C, padded)
    void *z = nullptr, *z_scale = nullptr;
    void* x_hat = nullptr;  // in X's memory order
    float* mse = nullptr;
};

FactorPlan plan_factors(const FactorProblem&, const Limits&, Method, int steps, bool reconstruct);

// `y0` in float32: lines are channels. The rounds, and with `reconstruct` what follows them; X' and
// its error only where plan.features is set: else the caller computes them from z and `bases`.
void find_factors(const FactorProblem&, const FactorPlan&, const Lines& y0, const Factors&,
                  void* workspace, void* stream);

struct NmfGradients {
    Lines grad_x_hat;                 // lines as X's; data null: none
    const float* grad_mse = nullptr;  // on the device; null: none
    Lines y;                          // float32; lines are channels
    Lines z, z_scale;                 // lines are bases
    void* grad_x = nullptr;           // dense, in X's memory order
};

struct NmfGradientPlan {
    ColumnPlan columns;
    size_t workspace_bytes = 0;
};

NmfGradientPlan plan_nmf_gradient(const FactorProblem&, const Limits&, const NmfGradients&);

void nmf_gradient(const FactorProblem&, const NmfGradientPlan&, const NmfGradients&,
                  void* workspace, void* stream);

}  // namespace mfops::cuda
