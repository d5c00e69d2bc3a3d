// Plans and launches of the kernels that find factors.
#include <algorithm>
#include <cmath>
#include <optional>

#include "cuda/common/plan.h"
#include "cuda/factorize/variants.h"

namespace mfops::cuda {
namespace {

// Bytes of Y's part that is kept at most; what is larger fits no GPU.
constexpr int64_t kMaxSharedBases = 1 << 20;

// About how many partial sums of a block's result are added in the time that a tile takes.
constexpr double kPartialsPerTile = 8;

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

// As many blocks as the GPU has room for at once. With `partials`, sums
// that every range leaves, only as long as fewer tiles for each save more than further sums cost.
ColumnWork deal(const FactorProblem& p, const Limits& limits, const ColumnShape& shape,
                int64_t groups, bool partials) {
    ColumnWork work;
    work.tiles = static_cast<int>(ceil_div(p.pixels, shape.pixels));
    work.chunks = static_cast<int>(ceil_div(p.channels, shape.own));
    work.groups = static_cast<int>(groups);
    int64_t ranges = std::min<int64_t>(limits.multiprocessors / (p.batch * groups), work.tiles);
    if (partials) {
        ranges = std::min(ranges, static_cast<int64_t>(std::sqrt(kPartialsPerTile * work.tiles)));
    }
    // No more than it takes for the longest to be that short.
    const int64_t longest = ceil_div(work.tiles, std::max<int64_t>(ranges, 1));
    work.ranges = static_cast<int>(ceil_div(work.tiles, longest));
    return work;
}

// How a round is computed: a load that is on its way while a tile is worked on counts for more than
// one kernel that reads X once.
void plan_rounds(const FactorProblem& p, const Limits& limits, const FamilyVariants& variants,
                 bool nmf, StreamPlan& plan) {
    const int padded = padded_16(p.rank);
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
        const auto& partials = variants.partials;
        const auto set = [&](size_t i) { return set_of(padded, partials[i].shape.rank); };
        plan.round = round_of(variants.coefficients, false, least);
        ColumnPlan columns = choose(
            partials.size(), limits, least, [](size_t) { return true; },
            [&](size_t i, int stages) { return partials[i].shared_bytes(set(i), stages); });
        if (!plan.round.stages || !columns.stages) continue;
        plan.round.work = deal(p, limits, variants.coefficients[plan.round.shape].shape, 1, false);
        const ColumnShape& shape = partials[columns.shape].shape;
        const int sets = sets_of(padded, set(columns.shape));
        columns.work = deal(p, limits, shape, ceil_div(p.channels, shape.own) * sets, true);
        if (nmf) columns.work.groups += sets;  // Z Z^T: short ones, that start last
        plan.partials = {.columns = columns, .set = set(columns.shape)};
        return;
    }
    no_room(p.rank, limits);
}

template <Update kUpdate>
void update(const FactorProblem& p, const UpdateParams& params, void* stream) {
    const unsigned blocks = checked_blocks(p.batch * params.slices);
    with_element(p.type, [&](auto element) {
        launch<update_kernel<decltype(element), kUpdate>>(
            blocks, kThreads, update_shared_bytes(padded_16(p.rank)), stream, params);
    });
}

void gram(const FactorProblem& p, const FactorVariants& variants, const void* bases, void* result,
          void* stream) {
    const int padded = padded_16(p.rank);
    const size_t bytes = element_bytes(p.type) == 2 ? gram_shared_bytes<bf16>(padded)
                                                    : gram_shared_bytes<float>(padded);
    variants.gram(
        checked_blocks(p.batch * (padded / 16)), bytes, stream,
        GramParams{.channels = p.channels, .padded = padded, .bases = bases, .gram = result});
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

// A wave of clusters takes the same time however few its images, a full one 0.56 of what streaming
// as many takes (512 x 1089 on an H200: em 228 us for two waves of 15, 214 us for streaming 16; nmf
// 542 and 518). So more than one is taken only with as large a part of their places.
bool fills_waves(int64_t images, int clusters) {
    const int64_t waves = ceil_div(images, clusters);
    return waves == 1 || 100 * images >= 56 * waves * clusters;
}

// None where the blocks of a cluster have no room for an image.
std::optional<PersistentPlan> plan_persistent(const FactorProblem& p, const Limits& limits,
                                              Method method) {
    // It keeps Z in X's type, and em's coefficients leave float16's range.
    const bool knows = (method == Method::kEm && p.type == Type::kBf16) ||
                       (method == Method::kNmf && element_bytes(p.type) == 2);
    if (!limits.clusters || !knows || p.channels > kMaxPersistentChannels ||
        p.rank > kMaxPersistentRank || p.pixels > kClusterBlocks * kMaxPersistentSpan ||
        !fills_waves(p.batch, limits.clusters)) {
        return std::nullopt;
    }
    const int span = static_cast<int>(ceil_div(ceil_div(p.pixels, 16), kClusterBlocks)) * 16;
    const PersistentLayout at{padded_32(static_cast<int>(p.channels)), padded_16(p.rank), span};
    if (at.bytes() > limits.shared_per_block) return std::nullopt;
    return PersistentPlan{.span = span, .shared_bytes = static_cast<size_t>(at.bytes())};
}

// Gives everything that passes between the kernels of a round its place in the workspace.
void plan_workspace(const FactorProblem& p, FactorizePlan& plan) {
    StreamPlan& stream = plan.stream;
    const bool nmf = plan.method == Method::kNmf;
    const auto take = [&](int64_t bytes) {
        const size_t at = plan.workspace_bytes;
        plan.workspace_bytes += ceil_div(bytes, 16) * 16;
        return at;
    };
    const int64_t padded = plan.padded;
    const int64_t partials =
        p.batch * (stream.partials ? stream.partials->columns : stream.round).work.ranges;
    stream.squares = take(p.batch * stream.slices * padded * sizeof(float));
    stream.factors = take(p.batch * padded * sizeof(float));
    stream.partial_sums = take(partials * p.channels * padded * sizeof(float));
    stream.sums = take(partials * padded * (nmf ? padded : 1) * sizeof(float));
    if (nmf) {
        stream.gram = take(p.batch * padded * padded * element_bytes(p.type));
        stream.coefficients = take(2 * p.batch * p.pixels * padded * element_bytes(p.type));
        if (plan.features) stream.errors = take(stream.last.work.blocks(p.batch) * sizeof(double));
    } else if (stream.partials) {
        const int64_t bytes = p.type == Type::kF16 ? sizeof(float) : element_bytes(p.type);
        stream.coefficients = take(p.batch * p.pixels * padded * bytes);
    }
}

void launch_persistent(const FactorProblem& p, const FactorizePlan& plan, const Lines& y0,
                       const Factors& factors, void* workspace, void* stream) {
    const FactorVariants variants = factor_variants(p);
    const bool nmf = plan.method == Method::kNmf;
    double* const errors = static_cast<double*>(workspace);
    const unsigned blocks = checked_blocks(p.batch * kClusterBlocks);
    (nmf ? variants.persistent_nmf : variants.persistent_em)(
        blocks, plan.persistent->shared_bytes, stream,
        PersistentParams{.problem = p,
                         .span = plan.persistent->span,
                         .steps = plan.steps,
                         .reconstruct = plan.reconstruct,
                         .start = y0,
                         .y = factors.y,
                         .z = factors.z,
                         .z_scale = factors.z_scale,
                         .x_hat = factors.x_hat,
                         .errors = errors});
    if (plan.reconstruct) mean_of(errors, blocks, p.elements(), factors.mse, stream);
}

// The launches of a call that streams X.
class StreamLaunches {
   public:
    StreamLaunches(const FactorProblem& p, const FactorizePlan& plan, const Lines& y0,
                   const Factors& factors, void* workspace, void* stream)
        : p_(p),
          plan_(plan),
          at_(plan.stream),
          factors_(factors),
          memory_(static_cast<char*>(workspace)),
          stream_(stream),
          nmf_(plan.method == Method::kNmf),
          variants_(factor_variants(p)),
          family_(nmf_ ? variants_.nmf : variants_.means),
          update_{.channels = p.channels,
                  .rank = p.rank,
                  .slice = at_.slice,
                  .slices = at_.slices,
                  .start = y0,
                  .partials = floats(at_.partial_sums),
                  .sums = floats(at_.sums),
                  .ranges = (at_.partials ? at_.partials->columns : at_.round).work.ranges,
                  .division = division_of(plan.method, false),
                  .y = factors.y,
                  .bases = factors.bases,
                  .squares = floats(at_.squares),
                  .factors = floats(at_.factors)} {}

    void run() const {
        update<Update::kStart>(p_, update_, stream_);
        for (int step = 0; step < plan_.steps; ++step) {
            round(round_variant(), at_.round, step);
            if (at_.partials) partials(*at_.partials, step);
            if (nmf_) {
                update<Update::kNmf>(p_, update_, stream_);
            } else {
                update<Update::kMeans>(p_, update_, stream_);
            }
        }
        if (plan_.method == Method::kEm || plan_.method == Method::kCd) {
            update<Update::kDivide>(p_, update_, stream_);
        }
        if (nmf_ && plan_.reconstruct) reconstruct();
    }

   private:
    float* floats(size_t at) const { return reinterpret_cast<float*>(memory_ + at); }
    double* errors() const { return reinterpret_cast<double*>(memory_ + at_.errors); }

    // Where a round leaves its Z; nmf's next round reads it there.
    void* z_of(int step) const {
        if (!nmf_ && !at_.partials) return nullptr;
        const int64_t bytes = p_.batch * p_.pixels * plan_.padded * element_bytes(p_.type);
        return memory_ + at_.coefficients + (nmf_ ? step % 2 * bytes : 0);
    }

    const RoundVariant& round_variant() const {
        return (at_.partials ? family_.coefficients : family_.rounds)[at_.round.shape];
    }

    void round(const RoundVariant& variant, const ColumnPlan& columns, int step) const {
        const bool last = step == plan_.steps;  // beyond the rounds
        const bool want_z = step == plan_.steps - !(nmf_ && plan_.reconstruct);
        if (nmf_) gram(p_, variants_, factors_.bases, memory_ + at_.gram, stream_);
        const RoundParams params{.problem = p_,
                                 .work = columns.work,
                                 .stages = columns.stages,
                                 .bases = factors_.bases,
                                 .division = division_of(plan_.method, step == 0),
                                 .squares = floats(at_.squares),
                                 .slices = at_.slices,
                                 .factors = floats(at_.factors),
                                 .inverse_temperature = plan_.inverse_temperature,
                                 .first = nmf_ && step == 0,
                                 .gram = memory_ + at_.gram,
                                 .z_before = z_of(step + 1),
                                 .z_after = last ? nullptr : z_of(step),
                                 .partials = floats(at_.partial_sums),
                                 .sums = floats(at_.sums),
                                 .z = want_z ? factors_.z : nullptr,
                                 .z_scale = last ? factors_.z_scale : nullptr,
                                 .x_hat = last ? factors_.x_hat : nullptr,
                                 .errors = last ? errors() : nullptr};
        variant.launch(checked_blocks(columns.work.blocks(p_.batch)), columns.shared_bytes, stream_,
                       params);
    }

    void partials(const PartialsPlan& plan, int step) const {
        const ColumnPlan& columns = plan.columns;
        family_.partials[columns.shape].launch(
            checked_blocks(columns.work.blocks(p_.batch)), columns.shared_bytes, stream_,
            PartialsParams{.problem = p_,
                           .work = columns.work,
                           .stages = columns.stages,
                           .set = plan.set,
                           .z = z_of(step),
                           .partials = floats(at_.partial_sums),
                           .sums = nmf_ ? nullptr : floats(at_.sums),
                           .squares = nmf_ ? floats(at_.sums) : nullptr});
    }

    // What follows nmf's last round; X' and its error only where one kernel has all channels.
    void reconstruct() const {
        if (!plan_.features) return round(round_variant(), at_.round, plan_.steps);
        round(family_.last[at_.last.shape], at_.last, plan_.steps);
        mean_of(errors(), at_.last.work.blocks(p_.batch), p_.elements(), factors_.mse, stream_);
    }

    const FactorProblem& p_;
    const FactorizePlan& plan_;
    const StreamPlan& at_;
    const Factors& factors_;
    char* const memory_;
    void* const stream_;
    const bool nmf_;
    const FactorVariants variants_;
    const FamilyVariants& family_;
    const UpdateParams update_;
};

}  // namespace

FactorizePlan plan_factorize(const FactorProblem& p, const Limits& limits, Method method, int steps,
                             bool reconstruct) {
    const bool nmf = method == Method::kNmf;
    FactorizePlan plan{.method = method,
                       .steps = steps,
                       .reconstruct = reconstruct,
                       .padded = padded_16(p.rank),
                       .persistent = plan_persistent(p, limits, method)};
    if (plan.persistent) {
        plan.features = reconstruct;
        if (reconstruct) plan.workspace_bytes = p.batch * kClusterBlocks * sizeof(double);
        return plan;
    }
    const FactorVariants variants = factor_variants(p);
    const FamilyVariants& family = nmf ? variants.nmf : variants.means;
    StreamPlan& stream = plan.stream;
    plan_rounds(p, limits, family, nmf, stream);
    plan.features = nmf && reconstruct && !stream.partials;
    if (plan.features) {  // takes as much room as a round
        stream.last = stream.round;
        stream.last.work = deal(p, limits, family.last[stream.last.shape].shape, 1, false);
    }
    stream.slice = slice_of(plan.padded);
    stream.slices = static_cast<int>(ceil_div(p.channels, stream.slice));
    plan_workspace(p, plan);
    return plan;
}

void launch_factorize(const FactorProblem& p, const FactorizePlan& plan, const Lines& y0,
                      const Factors& factors, void* workspace, void* stream) {
    if (plan.persistent) return launch_persistent(p, plan, y0, factors, workspace, stream);
    StreamLaunches(p, plan, y0, factors, workspace, stream).run();
}

NmfBackwardPlan plan_nmf_backward(const FactorProblem& p, const Limits& limits,
                                  const NmfGradients& grad) {
    const auto variants = factor_variants(p).nmf_backward;
    const bool two = grad.grad_x_hat.data && grad.grad_mse;
    NmfBackwardPlan plan;
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
                       !(whole(i) && p.channels * padded_16(p.rank) > kMaxSharedBases);
            },
            [&](size_t i, int stages) {
                return variants[i / 2].shared_bytes(p.rank, p.channels, stages, whole(i), two);
            });
        plan.whole = whole(plan.columns.shape);
        plan.columns.shape /= 2;
        if (plan.columns.stages) break;
    }
    if (!plan.columns.stages) no_room(p.rank, limits);
    const ColumnShape& shape = variants[plan.columns.shape].shape;
    plan.columns.work = deal(p, limits, shape, ceil_div(p.channels, shape.own), false);
    plan.workspace_bytes = p.batch * p.channels * padded_16(p.rank) * element_bytes(p.type);
    return plan;
}

void launch_nmf_backward(const FactorProblem& p, const NmfBackwardPlan& plan,
                         const NmfGradients& grad, void* workspace, void* stream) {
    const NmfBackwardVariant& variant = factor_variants(p).nmf_backward[plan.columns.shape];
    const int slice = slice_of(padded_16(p.rank));
    const UpdateParams round_bases{.channels = p.channels,
                                   .rank = p.rank,
                                   .slice = slice,
                                   .slices = static_cast<int>(ceil_div(p.channels, slice)),
                                   .start = grad.y,
                                   .bases = workspace};
    update<Update::kStart>(p, round_bases, stream);
    variant.launch(checked_blocks(plan.columns.work.blocks(p.batch)), plan.columns.shared_bytes,
                   stream,
                   NmfBackwardParams{.problem = p,
                                     .work = plan.columns.work,
                                     .stages = plan.columns.stages,
                                     .whole = plan.whole,
                                     .bases = workspace,
                                     .z = grad.z,
                                     .z_scale = grad.z_scale,
                                     .grad_x_hat = grad.grad_x_hat,
                                     .grad_mse = grad.grad_mse,
                                     .two_over_elements = 2.0 / p.elements(),
                                     .grad_x = grad.grad_x});
}

}  // namespace mfops::cuda
