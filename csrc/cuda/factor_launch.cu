// Plans and launches of the kernels that find factors.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/factor_variants.h"
#include "cuda/plan.h"

namespace mfops::cuda {
namespace {

// Bytes of Y's part that is kept at most; what is larger fits no GPU.
constexpr int64_t kMostShared = 1 << 20;

FactorVariants factor_variants(const FactorProblem& p) {
    switch (p.type) {
        case Type::kFloat32:
            return float32_factor_variants(p.transposed);
        case Type::kTf32:
            return tf32_factor_variants(p.transposed);
        case Type::kBf16:
            return bf16_factor_variants(p.transposed);
        default:
            return f16_factor_variants(p.transposed);
    }
}

int64_t element_bytes(const FactorProblem& p) {
    return p.type == Type::kBf16 || p.type == Type::kF16 ? 2 : 4;
}

// The first shape that fits, with all of Y in shared memory if that does, and its most stages.
// `with_gram`: Z Z^T is asked for too, whose rows the groups share.
template <class Variants>
ColumnPlan plan_columns(const FactorProblem& p, const Limits& limits, const Variants& variants,
                        bool two, bool with_gram, int64_t most_ranges) {
    const int padded = padded_16(p.rank);
    ColumnPlan plan;
    for (size_t i = 0; i < variants.size(); ++i) {
        const ColumnShape& shape = variants[i].shape;
        const bool smaller = i + 1 < variants.size() && variants[i + 1].shape.rank == shape.rank;
        if (shape.rank < p.rank || (smaller && shape.own > 2 * p.channels)) continue;
        for (const bool whole : {true, false}) {
            if (whole && p.channels * padded > kMostShared) continue;
            int stages = kMaxStages;
            const auto bytes = [&] {
                return variants[i].shared_bytes(p.rank, p.channels, stages, whole, two);
            };
            while (stages > 0 && bytes() > static_cast<size_t>(limits.shared_per_block)) --stages;
            if (stages == 0) continue;
            plan.shape = static_cast<int>(i);
            plan.stages = stages;
            plan.whole = whole;
            plan.shared_bytes = bytes();
            ColumnWork& work = plan.work;
            work.tiles = static_cast<int>(ceil_div(p.pixels, shape.pixels));
            work.chunks = static_cast<int>(ceil_div(p.channels, shape.own));
            work.groups = work.chunks;
            if (with_gram) {
                const int64_t wanted = ceil_div(padded, kGramRows);
                work.groups = std::max(work.chunks, static_cast<int>(wanted));
            }
            const int64_t ranges = limits.multiprocessors / (p.batch * work.groups);
            work.ranges = static_cast<int>(std::clamp<int64_t>(
                ranges, 1, std::max<int64_t>(1, std::min<int64_t>(work.tiles, most_ranges))));
            return plan;
        }
    }
    throw std::runtime_error("mfops: rank " + std::to_string(p.rank) + " needs more than the " +
                             std::to_string(limits.shared_per_block) +
                             " bytes of shared memory that a block has on this GPU");
}

template <Update kUpdate>
void update(const FactorProblem& p, const UpdateParams& params, void* stream) {
    const unsigned blocks = checked_blocks(p.batch * params.slices);
    const size_t bytes = update_shared_bytes(padded_16(p.rank));
    switch (p.type) {
        case Type::kBf16:
            return launch<update_kernel<bf16, kUpdate>>(blocks, kThreads, bytes, stream, params);
        case Type::kF16:
            return launch<update_kernel<f16, kUpdate>>(blocks, kThreads, bytes, stream, params);
        default:
            return launch<update_kernel<float, kUpdate>>(blocks, kThreads, bytes, stream, params);
    }
}

void gram(const FactorProblem& p, const FactorVariants& variants, const void* bases, void* result,
          void* stream) {
    const int padded = padded_16(p.rank);
    const size_t bytes =
        element_bytes(p) == 2 ? gram_shared_bytes<bf16>(padded) : gram_shared_bytes<float>(padded);
    variants.gram(checked_blocks(p.batch * (padded / 16)), bytes, stream,
                  GramParams{p.channels, padded, bases, result});
}

// What the columns of a round's Y are still to be divided by; y0's: whether they are at all.
Division division_of(Method method, bool start) {
    switch (method) {
        case Method::kEm:
            return start ? Division::kNone : Division::kSum;
        case Method::kCd:
            return start ? Division::kNone : Division::kMaximum;
        case Method::kVq:
            return Division::kMaximum;
        default:
            return Division::kNone;
    }
}

size_t resident_bytes(const FactorProblem& p, int span) {
    const ResidentPlaces at{padded_32(static_cast<int>(p.channels)), padded_16(p.rank), span};
    return at.bytes();
}

// The columns that a block of a cluster keeps, where all of them have room; else 0.
int resident_span(const FactorProblem& p, const Limits& limits, Method method) {
    // It keeps Z in X's type, and em's coefficients leave float16's range.
    const bool knows = (method == Method::kEm && p.type == Type::kBf16) ||
                       (method == Method::kNmf && element_bytes(p) == 2);
    if (!limits.clusters || !knows || p.channels > kMostChannels || p.rank > kMostRank ||
        p.pixels > kCluster * kMostSpan) {
        return 0;
    }
    const int span = static_cast<int>(ceil_div(ceil_div(p.pixels, 16), kCluster)) * 16;
    return resident_bytes(p, span) <= static_cast<size_t>(limits.shared_per_block) ? span : 0;
}

}  // namespace

FactorPlan plan_factors(const FactorProblem& p, const Limits& limits, Method method, int steps,
                        bool solve) {
    const FactorVariants variants = factor_variants(p);
    const bool nmf = method == Method::kNmf;
    const int64_t padded = padded_16(p.rank);
    FactorPlan plan;
    plan.method = method;
    plan.steps = steps;
    plan.solve = solve;
    plan.padded = static_cast<int>(padded);
    plan.span = resident_span(p, limits, method);
    if (plan.span) {
        plan.shared_bytes = resident_bytes(p, plan.span);
        if (solve) plan.workspace_bytes = p.batch * kCluster * sizeof(double);
        return plan;
    }
    // All shares take at most X's memory.
    const int64_t x_bytes = p.batch * p.channels * p.pixels * element_bytes(p);
    const int64_t share_bytes = sizeof(float) * p.batch * p.channels * padded;
    plan.round = plan_columns(p, limits, nmf ? variants.nmf : variants.means, false, nmf,
                              x_bytes / share_bytes);
    if (nmf && solve) {
        plan.last = plan_columns(p, limits, variants.nmf_last, false, false, plan.round.work.tiles);
    }
    plan.slice = slice_of(static_cast<int>(padded));
    plan.slices = static_cast<int>(ceil_div(p.channels, plan.slice));

    const auto take = [&](int64_t bytes) {
        const size_t at = plan.workspace_bytes;
        plan.workspace_bytes += ceil_div(bytes, 16) * 16;
        return at;
    };
    const int64_t ranges = plan.round.work.ranges;
    plan.squares = take(p.batch * plan.slices * padded * sizeof(float));
    plan.factors = take(p.batch * padded * sizeof(float));
    plan.shares = take(ranges * share_bytes);
    plan.sums = take(p.batch * ranges * padded * (nmf ? padded : 1) * sizeof(float));
    if (nmf) {
        plan.gram = take(p.batch * padded * padded * element_bytes(p));
        plan.coefficients = take(2 * p.batch * p.pixels * padded * element_bytes(p));
        if (solve) plan.errors = take(plan.last.work.blocks(p.batch) * sizeof(double));
    }
    return plan;
}

void find_factors(const FactorProblem& p, const FactorPlan& plan, const Lines& y0,
                  const Factors& factors, void* workspace, void* stream) {
    const FactorVariants variants = factor_variants(p);
    const bool nmf = plan.method == Method::kNmf;
    char* const memory = static_cast<char*>(workspace);
    const double elements = static_cast<double>(p.batch) * p.channels * p.pixels;
    if (plan.span) {
        double* const errors = static_cast<double*>(workspace);
        const unsigned blocks = checked_blocks(p.batch * kCluster);
        (nmf ? variants.resident_nmf : variants.resident_em)(
            blocks, plan.shared_bytes, stream,
            ResidentParams{p, plan.span, plan.steps, plan.solve, y0, factors.y, factors.z,
                           factors.slope, factors.x_hat, errors});
        if (plan.solve) mean_of(errors, blocks, elements, factors.mse, stream);
        return;
    }
    const auto floats = [&](size_t at) { return reinterpret_cast<float*>(memory + at); };
    void* const bases = factors.bases;
    const int64_t z_bytes = p.batch * p.pixels * padded_16(p.rank) * element_bytes(p);
    const auto z_of = [&](int step) {
        return nmf ? memory + plan.coefficients + step % 2 * z_bytes : nullptr;
    };

    UpdateParams next{p.channels,
                      p.rank,
                      plan.slice,
                      plan.slices,
                      y0,
                      floats(plan.shares),
                      floats(plan.sums),
                      plan.round.work.ranges,
                      division_of(plan.method, false),
                      factors.y,
                      bases,
                      floats(plan.squares),
                      floats(plan.factors)};
    update<Update::kStart>(p, next, stream);

    const auto run = [&](const RoundVariant& variant, const ColumnPlan& columns, int step) {
        const bool last = step == plan.steps;  // beyond the rounds
        const bool want_z = step == plan.steps - !(nmf && plan.solve);
        if (nmf) gram(p, variants, bases, memory + plan.gram, stream);
        RoundParams params{};
        params.problem = p;
        params.work = columns.work;
        params.stages = columns.stages;
        params.whole = columns.whole;
        params.bases = bases;
        params.division = division_of(plan.method, step == 0);
        params.squares = floats(plan.squares);
        params.slices = plan.slices;
        params.factors = floats(plan.factors);
        params.cosines = plan.method == Method::kVq || plan.method == Method::kCd;
        params.first = nmf && step == 0;
        params.gram = memory + plan.gram;
        params.z_before = z_of(step + 1);
        params.z_after = z_of(step);
        params.shares = floats(plan.shares);
        params.sums = floats(plan.sums);
        params.z = want_z ? factors.z : nullptr;
        if (last) {
            params.slope = factors.slope;
            params.x_hat = factors.x_hat;
            params.errors = reinterpret_cast<double*>(memory + plan.errors);
        }
        variant.launch(checked_blocks(columns.work.blocks(p.batch)), columns.shared_bytes, stream,
                       params);
    };
    for (int step = 0; step < plan.steps; ++step) {
        run((nmf ? variants.nmf : variants.means)[plan.round.shape], plan.round, step);
        if (nmf) {
            update<Update::kNmf>(p, next, stream);
        } else {
            update<Update::kMeans>(p, next, stream);
        }
    }
    if (plan.method == Method::kEm || plan.method == Method::kCd) {
        update<Update::kDivide>(p, next, stream);
    }
    if (!nmf || !plan.solve) return;
    run(variants.nmf_last[plan.last.shape], plan.last, plan.steps);
    mean_of(reinterpret_cast<const double*>(memory + plan.errors), plan.last.work.blocks(p.batch),
            elements, factors.mse, stream);
}

NmfGradientPlan plan_nmf_gradient(const FactorProblem& p, const Limits& limits,
                                  const NmfGradients& grad) {
    const FactorVariants variants = factor_variants(p);
    const bool two = grad.grad_x_hat.data && grad.grad_mse;
    NmfGradientPlan plan;
    plan.columns = plan_columns(p, limits, variants.nmf_backward, two, false, p.pixels);
    plan.workspace_bytes = p.batch * p.channels * padded_16(p.rank) * element_bytes(p);
    return plan;
}

void nmf_gradient(const FactorProblem& p, const NmfGradientPlan& plan, const NmfGradients& grad,
                  void* workspace, void* stream) {
    const NmfBackwardVariant& variant = factor_variants(p).nmf_backward[plan.columns.shape];
    const int slice = slice_of(padded_16(p.rank));
    UpdateParams round_bases{};
    round_bases.channels = p.channels;
    round_bases.rank = p.rank;
    round_bases.slice = slice;
    round_bases.slices = static_cast<int>(ceil_div(p.channels, slice));
    round_bases.start = grad.y;
    round_bases.bases = workspace;
    update<Update::kStart>(p, round_bases, stream);
    variant.launch(checked_blocks(plan.columns.work.blocks(p.batch)), plan.columns.shared_bytes,
                   stream,
                   NmfBackwardParams{p, plan.columns.work, plan.columns.stages, plan.columns.whole,
                                     workspace, grad.z, grad.slope, grad.grad_x_hat, grad.grad_mse,
                                     2.0 / (static_cast<double>(p.batch) * p.channels * p.pixels),
                                     grad.grad_x});
}

}  // namespace mfops::cuda
