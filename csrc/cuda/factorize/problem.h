// What a call that finds factors on each image asks of the kernels, free of torch and of CUDA's
// headers. Formulas: mfops/methods, mfops/reference.py.
//
// Unlike the roles in reconstruct/problem.h these do not depend on memory: X is (channels x
// pixels), Y (channels x rank), Z (rank x pixels). Inside, Y is kept as lines of bases, one for
// each channel, Z as lines of bases, one for each pixel, both in X's type and padded with zeros to
// whole 16s of bases.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "cuda/common/types.h"

namespace mfops::cuda {

enum class Method { kEm, kVq, kCd, kNmf };

struct FactorProblem {
    Type type = Type::kFloat32;
    bool transposed = false;  // channels innermost
    int64_t batch = 0, channels = 0, pixels = 0;
    int rank = 0;
    Lines x;  // lines are channels, or pixels where transposed

    double elements() const { return static_cast<double>(batch) * channels * pixels; }
};

// How blocks share the tiles of pixels of all images. Of each tile `groups`
// blocks compute a part.
struct ColumnWork {
    int tiles = 0;   // of an image
    int ranges = 1;  // of tiles
    int groups = 1;
    int chunks = 1;  // of channels

    int64_t blocks(int64_t batch) const { return batch * ranges * groups; }
};

struct ColumnPlan {
    int shape = 0;   // index into the table of tile shapes
    int stages = 0;  // 0: there is no such plan
    ColumnWork work;
    size_t shared_bytes = 0;
};

// One launch for all rounds, each block keeping `span` columns of X.
struct PersistentPlan {
    int span = 0;
    size_t shared_bytes = 0;
};

// A round's second kernel, which multiplies by the Z that the first has left.
struct PartialsPlan {
    ColumnPlan columns;
    int set = 0;  // bases that a block takes
};

// A launch or two for each round.
struct StreamPlan {
    ColumnPlan round;                      // finds Z and, where it is alone, multiplies by it
    std::optional<PartialsPlan> partials;  // where all channels and bases are too many for one
    ColumnPlan last;                       // nmf, where a round is one kernel: X' and its error
    int slice = 0, slices = 0;  // channels whose bases one block updates, and their number
    // Bytes from the beginning of the workspace.
    size_t squares = 0, factors = 0, partial_sums = 0, sums = 0, gram = 0, coefficients = 0,
           errors = 0;
};

struct FactorizePlan {
    Method method = Method::kEm;
    int steps = 0;
    float inverse_temperature = 0;  // of vq and cd
    bool reconstruct = false;       // not the rounds alone
    int padded = 0;                 // K in whole 16s
    bool features = false;          // X' and its error are computed too
    std::optional<PersistentPlan> persistent;
    StreamPlan stream;  // else
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

FactorizePlan plan_factorize(const FactorProblem&, const Limits&, Method, int steps,
                             bool reconstruct);

// `y0` in float32: lines are channels. The rounds, and with `reconstruct` what follows them; X' and
// its error only where plan.features is set: else the caller computes them from z and `bases`.
void launch_factorize(const FactorProblem&, const FactorizePlan&, const Lines& y0, const Factors&,
                      void* workspace, void* stream);

struct NmfGradients {
    Lines grad_x_hat;                 // lines as X's; data null: none
    const float* grad_mse = nullptr;  // on the device; null: none
    Lines y;                          // float32; lines are channels
    Lines z, z_scale;                 // lines are bases
    void* grad_x = nullptr;           // dense, in X's memory order
};

struct NmfBackwardPlan {
    ColumnPlan columns;
    bool whole = false;  // all of Y lies in shared memory, for all tiles
    size_t workspace_bytes = 0;
};

NmfBackwardPlan plan_nmf_backward(const FactorProblem&, const Limits&, const NmfGradients&);

void launch_nmf_backward(const FactorProblem&, const NmfBackwardPlan&, const NmfGradients&,
                         void* workspace, void* stream);

}  // namespace mfops::cuda
