// Plans and launches of the kernels that find factors.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cuda/common/plan.h"
#include "cuda/factorize/variants.h"

namespace mfops::cuda {
namespace {

// Bytes of Y's part that is kept at most; what is larger fits no GPU.
constexpr int64_t kMostShared = 1 << 20;

// About how many shares of a block's result are added in the time that a tile takes.
constexpr double kSharesPerTile = 8;

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

// The first shape that suits and that fits in `least` stages or more, in the most that fit.
template <class Suits, class Bytes>
ColumnPlan choose(size_t shapes, const Limits& limits, int least, Suits suits, Bytes bytes) {
    ColumnPlan plan;
    for (size_t i = 0; i < shapes; ++i) {
        for (int stages = kMaxStages; suits(i) && stages >= least; --stages) {
            const size_t needed = bytes(i, stages);
            if (needed > static_cast<size_t>(limits.shared_per_block)) continue;
            plan.shape = static_cast<int>(i);
            plan.stages = stages;
            plan.shared_bytes = needed;
            return plan;
        }
    }
    return plan;
}

// As many blocks as the GPU has room for at once. With `shares`, that every range leaves and that
// are added up, only as long as fewer tiles for each save more than further shares cost.
ColumnWork deal(const FactorProblem& p, const Limits& limits, const ColumnShape& shape,
                int64_t groups, bool shares) {
    ColumnWork work;
    work.tiles = static_cast<int>(ceil_div(p.pixels, shape.pixels));
    work.chunks = static_cast<int>(ceil_div(p.channels, shape.own));
    work.groups = static_cast<int>(groups);
    int64_t ranges = std::min<int64_t>(limits.multiprocessors / (p.batch * groups), work.tiles);
    if (shares) {
        ranges = std::min(ranges, static_cast<int64_t>(std::sqrt(kSharesPerTile * work.tiles)));
    }
    // No more than it takes for the longest to be that short.
    const int64_t longest = ceil_div(work.tiles, std::max<int64_t>(ranges, 1));
    work.ranges = static_cast<int>(ceil_div(work.tiles, longest));
    return work;
}

[[noreturn]] void no_room(const FactorProblem& p, const Limits& limits) {
    throw std::runtime_error("mfops: rank " + std::to_string(p.rank) + " needs more than the " +
                             std::to_string(limits.shared_per_block) +
                             " bytes of shared memory that a block has on this GPU");
}

// How a round is computed: a load that is on its way while a tile is worked on counts for more than
// one kernel that reads X once.
void plan_rounds(const FactorProblem& p, const Limits& limits, const FamilyVariants& variants,
                 bool with_gram, FactorPlan& plan) {
    const auto round_of = [&](std::span<const RoundVariant> rounds, bool all_channels, int least) {
        return choose(
            rounds.size(), limits, least,
            [&](size_t i) {
                const ColumnShape& shape = rounds[i].shape;
                return shape.rank >= p.rank && (!all_channels || shape.own >= p.channels);
            },
            [&](size_t i, int stages) {
                return rounds[i].shared_bytes(p.rank, p.channels, stages);
            });
    };
    for (const int least : {2, 1}) {
        plan.round = round_of(variants.rounds, true, least);
        if (plan.round.stages) {
            const ColumnShape& shape = variants.rounds[plan.round.shape].shape;
            plan.round.work = deal(p, limits, shape, 1, true);
            return;
        }
        const auto& shares = variants.shares;
        const auto set = [&](size_t i) { return set_of(plan.padded, shares[i].shape.rank); };
        plan.round = round_of(variants.coefficients, false, least);
        plan.shares = choose(
            shares.size(), limits, least, [](size_t) { return true; },
            [&](size_t i, int stages) { return shares[i].shared_bytes(set(i), stages); });
        if (!plan.round.stages || !plan.shares.stages) continue;
        plan.split = true;
        plan.set = set(plan.shares.shape);
        plan.round.work = deal(p, limits, variants.coefficients[plan.round.shape].shape, 1, false);
        const ColumnShape& shape = shares[plan.shares.shape].shape;
        const int sets = sets_of(plan.padded, plan.set);
        plan.shares.work = deal(p, limits, shape, ceil_div(p.channels, shape.own) * sets, true);
        if (with_gram) plan.shares.work.groups += sets;  // short ones, that start last
        return;
    }
    no_room(p, limits);
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

// A wave of clusters takes the same time however few its images, and a full one about as long as
// streaming as many (em at 512 x 1089 on an H200: 122 us for 15, against 128 us for 16, by what
// streaming 4225 pixels takes). So more than one is taken only with five sixths of their places.
bool fills_waves(int64_t images, int clusters) {
    const int64_t waves = ceil_div(images, clusters);
    return waves == 1 || 6 * images >= 5 * waves * clusters;
}

// The columns that a block of a cluster keeps, where all of them have room; else 0.
int resident_span(const FactorProblem& p, const Limits& limits, Method method) {
    // It keeps Z in X's type, and em's coefficients leave float16's range.
    const bool knows = (method == Method::kEm && p.type == Type::kBf16) ||
                       (method == Method::kNmf && element_bytes(p) == 2);
    if (!limits.clusters || !knows || p.channels > kMostChannels || p.rank > kMostRank ||
        p.pixels > kCluster * kMostSpan || !fills_waves(p.batch, limits.clusters)) {
        return 0;
    }
    const int span = static_cast<int>(ceil_div(ceil_div(p.pixels, 16), kCluster)) * 16;
    return resident_bytes(p, span) <= static_cast<size_t>(limits.shared_per_block) ? span : 0;
}

}  // namespace

FactorPlan plan_factors(const FactorProblem& p, const Limits& limits, Method method, int steps,
                        bool reconstruct) {
    const FactorVariants variants = factor_variants(p);
    const bool nmf = method == Method::kNmf;
    const int64_t padded = padded_16(p.rank);
    FactorPlan plan;
    plan.method = method;
    plan.steps = steps;
    plan.reconstruct = reconstruct;
    plan.padded = static_cast<int>(padded);
    plan.span = resident_span(p, limits, method);
    if (plan.span) {
        plan.shared_bytes = resident_bytes(p, plan.span);
        plan.features = reconstruct;
        if (reconstruct) plan.workspace_bytes = p.batch * kCluster * sizeof(double);
        return plan;
    }
    const int64_t share_bytes = sizeof(float) * p.batch * p.channels * padded;
    const FamilyVariants& family = nmf ? variants.nmf : variants.means;
    plan_rounds(p, limits, family, nmf, plan);
    plan.features = nmf && reconstruct && !plan.split;
    if (plan.features) {  // takes as much room as a round
        plan.last = plan.round;
        plan.last.work = deal(p, limits, family.last[plan.last.shape].shape, 1, false);
    }
    plan.slice = slice_of(static_cast<int>(padded));
    plan.slices = static_cast<int>(ceil_div(p.channels, plan.slice));

    const auto take = [&](int64_t bytes) {
        const size_t at = plan.workspace_bytes;
        plan.workspace_bytes += ceil_div(bytes, 16) * 16;
        return at;
    };
    const int64_t ranges = (plan.split ? plan.shares : plan.round).work.ranges;
    plan.squares = take(p.batch * plan.slices * padded * sizeof(float));
    plan.factors = take(p.batch * padded * sizeof(float));
    plan.shares_at = take(ranges * share_bytes);
    plan.sums = take(p.batch * ranges * padded * (nmf ? padded : 1) * sizeof(float));
    if (nmf) {
        plan.gram = take(p.batch * padded * padded * element_bytes(p));
        plan.coefficients = take(2 * p.batch * p.pixels * padded * element_bytes(p));
        if (plan.features) plan.errors = take(plan.last.work.blocks(p.batch) * sizeof(double));
    } else if (plan.split) {
        const int64_t bytes = p.type == Type::kF16 ? sizeof(float) : element_bytes(p);
        plan.coefficients = take(p.batch * p.pixels * padded * bytes);
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
            ResidentParams{p, plan.span, plan.steps, plan.reconstruct, y0, factors.y, factors.z,
                           factors.z_scale, factors.x_hat, errors});
        if (plan.reconstruct) mean_of(errors, blocks, elements, factors.mse, stream);
        return;
    }
    const auto floats = [&](size_t at) { return reinterpret_cast<float*>(memory + at); };
    void* const bases = factors.bases;
    const int64_t z_bytes = p.batch * p.pixels * padded_16(p.rank) * element_bytes(p);
    const auto z_of = [&](int step) -> void* {
        if (!nmf && !plan.split) return nullptr;
        return memory + plan.coefficients + (nmf ? step % 2 * z_bytes : 0);
    };

    UpdateParams next{p.channels,
                      p.rank,
                      plan.slice,
                      plan.slices,
                      y0,
                      floats(plan.shares_at),
                      floats(plan.sums),
                      (plan.split ? plan.shares : plan.round).work.ranges,
                      division_of(plan.method, false),
                      factors.y,
                      bases,
                      floats(plan.squares),
                      floats(plan.factors)};
    update<Update::kStart>(p, next, stream);

    const FamilyVariants& family = nmf ? variants.nmf : variants.means;
    const auto run = [&](const RoundVariant& variant, const ColumnPlan& columns, int step) {
        const bool last = step == plan.steps;  // beyond the rounds
        const bool want_z = step == plan.steps - !(nmf && plan.reconstruct);
        if (nmf) gram(p, variants, bases, memory + plan.gram, stream);
        RoundParams params{};
        params.problem = p;
        params.work = columns.work;
        params.stages = columns.stages;
        params.bases = bases;
        params.division = division_of(plan.method, step == 0);
        params.squares = floats(plan.squares);
        params.slices = plan.slices;
        params.factors = floats(plan.factors);
        params.inverse_temperature = plan.inverse_temperature;
        params.first = nmf && step == 0;
        params.gram = memory + plan.gram;
        params.z_before = z_of(step + 1);
        params.z_after = last ? nullptr : z_of(step);
        params.shares = floats(plan.shares_at);
        params.sums = floats(plan.sums);
        params.z = want_z ? factors.z : nullptr;
        if (last) {
            params.z_scale = factors.z_scale;
            params.x_hat = factors.x_hat;
            params.errors = reinterpret_cast<double*>(memory + plan.errors);
        }
        variant.launch(checked_blocks(columns.work.blocks(p.batch)), columns.shared_bytes, stream,
                       params);
    };
    const RoundVariant& round =
        (plan.split ? family.coefficients : family.rounds)[plan.round.shape];
    for (int step = 0; step < plan.steps; ++step) {
        run(round, plan.round, step);
        if (plan.split) {
            const ColumnPlan& shares = plan.shares;
            family.shares[shares.shape].launch(
                checked_blocks(shares.work.blocks(p.batch)), shares.shared_bytes, stream,
                ShareParams{p, shares.work, shares.stages, plan.set, z_of(step),
                            floats(plan.shares_at), nmf ? nullptr : floats(plan.sums),
                            nmf ? floats(plan.sums) : nullptr});
        }
        if (nmf) {
            update<Update::kNmf>(p, next, stream);
        } else {
            update<Update::kMeans>(p, next, stream);
        }
    }
    if (plan.method == Method::kEm || plan.method == Method::kCd) {
        update<Update::kDivide>(p, next, stream);
    }
    if (!nmf || !plan.reconstruct) return;
    if (!plan.features) return run(round, plan.round, plan.steps);
    run(family.last[plan.last.shape], plan.last, plan.steps);
    mean_of(reinterpret_cast<const double*>(memory + plan.errors), plan.last.work.blocks(p.batch),
            elements, factors.mse, stream);
}

NmfGradientPlan plan_nmf_gradient(const FactorProblem& p, const Limits& limits,
                                  const NmfGradients& grad) {
    const auto variants = factor_variants(p).nmf_backward;
    const bool two = grad.grad_x_hat.data && grad.grad_mse;
    NmfGradientPlan plan;
    // Each shape first with all of Y in shared memory.
    const auto whole = [](size_t i) { return i % 2 == 0; };
    for (const int least : {2, 1}) {
        plan.columns = choose(
            2 * variants.size(), limits, least,
            [&](size_t i) {
                const ColumnShape& shape = variants[i / 2].shape;
                const bool smaller =
                    i / 2 + 1 < variants.size() && variants[i / 2 + 1].shape.rank == shape.rank;
                return shape.rank >= p.rank && !(smaller && shape.own > 2 * p.channels) &&
                       !(whole(i) && p.channels * padded_16(p.rank) > kMostShared);
            },
            [&](size_t i, int stages) {
                return variants[i / 2].shared_bytes(p.rank, p.channels, stages, whole(i), two);
            });
        plan.columns.whole = whole(plan.columns.shape);
        plan.columns.shape /= 2;
        if (plan.columns.stages) break;
    }
    if (!plan.columns.stages) no_room(p, limits);
    const ColumnShape& shape = variants[plan.columns.shape].shape;
    plan.columns.work = deal(p, limits, shape, ceil_div(p.channels, shape.own), false);
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
    variant.launch(
        checked_blocks(plan.columns.work.blocks(p.batch)), plan.columns.shared_bytes, stream,
        NmfBackwardParams{p, plan.columns.work, plan.columns.stages, plan.columns.whole, workspace,
                          grad.z, grad.z_scale, grad.grad_x_hat, grad.grad_mse,
                          2.0 / (static_cast<double>(p.batch) * p.channels * p.pixels),
                          grad.grad_x});
}

}  // namespace mfops::cuda
