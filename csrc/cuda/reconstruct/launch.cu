// Plans and launches: which shape of tiles, how many stages, how the work is dealt out.
#include <algorithm>

#include "cuda/common/plan.h"
#include "cuda/reconstruct/variants.h"

namespace mfops::cuda {
namespace {

Variants variants(const Problem& problem) {
    const bool shared = !problem.a_per_image && !problem.b_per_image;
    switch (problem.type) {
        case Type::kFloat32:
            return float32_variants(problem.transposed, shared);
        case Type::kTf32:
            return tf32_variants(problem.transposed, shared);
        case Type::kBf16:
            return bf16_variants(problem.transposed, shared);
        default:
            return f16_variants(problem.transposed, shared);
    }
}

// Most stages with which `blocks` blocks fit on a multiprocessor; 0: not even one.
template <class SharedBytes>
int stages_that_fit(const Limits& limits, int blocks, SharedBytes shared_bytes) {
    const size_t each = std::min<size_t>(
        limits.shared_per_block, limits.shared_per_multiprocessor / blocks - kReservedBytes);
    int stages = kMaxStages;
    while (stages > 0 && shared_bytes(stages) > each) --stages;
    return stages;
}

struct Choice {
    int shape, stages, blocks;  // blocks: on a multiprocessor
};

// `shared_bytes(shape, stages)`. Two stages, so that a tile is on its way while one is worked on,
// count for more than a second block or a large tile.
template <class Shapes, class SharedBytes>
Choice choose(const Shapes& shapes, const Limits& limits, int rank, SharedBytes shared_bytes) {
    for (const int least : {2, 1}) {
        for (int i = 0; i < static_cast<int>(shapes.size()); ++i) {
            if (shapes[i].shape.max_rank < rank) continue;
            for (int blocks = shapes[i].shape.blocks; blocks > 0; --blocks) {
                const int stages = stages_that_fit(
                    limits, blocks, [&](int n) { return shared_bytes(shapes[i], n); });
                if (stages >= least) return {i, stages, blocks};
            }
        }
    }
    no_room(rank, limits);
}

// Deals `tiles` tiles by strips out to about `blocks` blocks. A factor that differs from image to
// image takes a chunk for each; otherwise images are split only where tiles do not suffice, since
// each chunk computes the product anew.
Work deal(int64_t strips, int64_t tiles, int64_t batch, bool own_per_image, int64_t blocks,
          int64_t max_partials) {
    Work work;
    work.strips = work.strips_per_part = static_cast<int>(strips);
    work.tiles = static_cast<int>(tiles);
    work.chunks = own_per_image ? static_cast<int>(batch) : 1;
    const int64_t wanted =
        std::clamp<int64_t>(blocks / (strips * work.chunks), 1, std::max<int64_t>(1, max_partials));
    work.ranges = static_cast<int>(std::min(tiles, wanted));
    if (!own_per_image) work.chunks = static_cast<int>(std::min(batch, wanted / work.ranges));
    return work;
}

// The partial sums of a factor's gradient: how many, and what memory they take.
struct Partials {
    Partials(const Work& work, int64_t extent, int rank, bool per_image, int64_t batch)
        : elements(extent * rank),
          results(per_image ? batch : 1),
          count(static_cast<int64_t>(work.ranges) * work.chunks / results),
          floats(count > 1 ? elements * results * count : 0) {}
    int64_t elements, results, count, floats;
};

Partials row_partials(const Problem& p, const BackwardPlan& plan) {
    return {plan.rows, p.rows, p.rank, p.a_per_image, p.batch};
}
Partials col_partials(const Problem& p, const BackwardPlan& plan) {
    return {plan.cols, p.cols, p.rank, p.b_per_image, p.batch};
}

template <class T>
void sum_partials(const Partials& partials, const float* from, void* to, void* stream) {
    const int64_t elements = partials.elements * partials.results;
    const int64_t blocks = std::min<int64_t>(ceil_div(elements, kThreads), 4096);
    launch<sum_kernel<T>>(static_cast<unsigned>(blocks), kThreads, 0, stream,
                          SumParams{.partials = from,
                                    .result = to,
                                    .elements = partials.elements,
                                    .count = static_cast<int>(partials.count),
                                    .results = partials.results});
}

}  // namespace

ForwardPlan plan_forward(const Problem& p, const Limits& limits) {
    const auto shapes = variants(p).forward;
    const Choice choice = choose(shapes, limits, p.rank, [&](const ForwardVariant& v, int stages) {
        return v.shared_bytes(p.rank, stages);
    });
    const ForwardVariant& variant = shapes[choice.shape];
    const int64_t tiles = ceil_div(p.cols, variant.shape.stream);
    ForwardPlan plan;
    plan.shape = choice.shape;
    plan.stages = choice.stages;
    plan.shared_bytes = variant.shared_bytes(p.rank, choice.stages);
    plan.work = deal(ceil_div(p.rows, variant.shape.own), tiles, p.batch, p.a_per_image,
                     static_cast<int64_t>(choice.blocks) * limits.multiprocessors, tiles * p.batch);
    plan.workspace_bytes = plan.work.blocks() * sizeof(double);
    return plan;
}

void launch_forward(const Problem& p, const ForwardPlan& plan, void* x_hat, float* mse,
                    void* workspace, void* stream) {
    const ForwardVariant& variant = variants(p).forward[plan.shape];
    double* const errors = static_cast<double*>(workspace);
    const unsigned blocks = checked_blocks(plan.work.blocks());
    variant.launch(blocks, plan.shared_bytes, stream,
                   ForwardParams{.problem = p,
                                 .work = plan.work,
                                 .stages = plan.stages,
                                 .x_hat = x_hat,
                                 .errors = errors});
    mean_of(errors, blocks, static_cast<double>(p.batch) * p.rows * p.cols, mse, stream);
}

BackwardPlan plan_backward(const Problem& p, const Limits& limits, const Gradients& grad) {
    const bool with_grad = grad.grad_x_hat.data != nullptr;
    const auto shapes = variants(p).backward;
    const Choice choice = choose(shapes, limits, p.rank, [&](const BackwardVariant& v, int stages) {
        return v.shared_bytes(p.rank, with_grad, stages);
    });
    const BackwardVariant& variant = shapes[choice.shape];
    const int own = variant.shape.own, stream = variant.shape.stream;
    BackwardPlan plan;
    plan.shape = choice.shape;
    plan.stages = choice.stages;
    plan.shared_bytes = variant.shared_bytes(p.rank, with_grad, choice.stages);

    // dX goes with the kind that streams along X's lines, unless only the other kind runs.
    const bool by_rows = grad.grad_a || !grad.grad_b, by_cols = grad.grad_b != nullptr;
    plan.x_by_rows = grad.grad_x && by_rows;
    plan.x_by_cols = grad.grad_x && !by_rows;
    const int64_t slots = static_cast<int64_t>(choice.blocks) * limits.multiprocessors;
    const int64_t each = by_rows && by_cols ? std::max<int64_t>(1, slots / 2) : slots;
    // All partial sums of a factor take at most a quarter of X's memory.
    const int64_t x_bytes = p.batch * p.rows * p.cols * element_bytes(p.type);
    const auto max_partials = [&](int64_t extent, bool per_image) {
        const int64_t partial_bytes = (per_image ? p.batch : 1) * extent * p.rank * sizeof(float);
        return x_bytes / 4 / partial_bytes;
    };
    if (by_rows) {
        plan.rows = deal(ceil_div(p.rows, own), ceil_div(p.cols, stream), p.batch, p.a_per_image,
                         each, max_partials(p.rows, p.a_per_image));
    }
    if (by_cols) {
        plan.cols = deal(ceil_div(p.cols, own), ceil_div(p.rows, stream), p.batch, p.b_per_image,
                         each, max_partials(p.cols, p.b_per_image));
    }
    // The kind with fewer blocks starts first and goes through the matrix in `ranges` parts at
    // once; the other kind's blocks come in the order in which those parts are read.
    plan.cols_first = by_cols && (!by_rows || plan.cols.blocks() < plan.rows.blocks());
    if (by_rows && by_cols) {
        Work& other = plan.cols_first ? plan.rows : plan.cols;
        const Work& first = plan.cols_first ? plan.cols : plan.rows;
        other.interleave = std::min(first.ranges, other.strips);
        other.strips_per_part = static_cast<int>(ceil_div(other.strips, other.interleave));
    }
    plan.workspace_bytes =
        sizeof(float) * (row_partials(p, plan).floats + col_partials(p, plan).floats);
    return plan;
}

void launch_backward(const Problem& p, const BackwardPlan& plan, const Gradients& grad,
                     void* workspace, void* stream) {
    const BackwardVariant& variant = variants(p).backward[plan.shape];
    const bool by_rows = plan.rows.strips > 0, by_cols = plan.cols.strips > 0;
    const Partials rows = row_partials(p, plan), cols = col_partials(p, plan);
    float* const row_sums = static_cast<float*>(workspace);
    float* const col_sums = row_sums + rows.floats;
    const auto target = [](void* result, const Partials& partials, float* sums) {
        return !result              ? FactorGradient{}
               : partials.count > 1 ? FactorGradient{nullptr, sums}
                                    : FactorGradient{result, nullptr};
    };
    const int64_t row_blocks = by_rows ? plan.rows.blocks() : 0;
    const int64_t col_blocks = by_cols ? plan.cols.blocks() : 0;
    const double elements = static_cast<double>(p.batch) * p.rows * p.cols;
    const BackwardParams params{
        .problem = p,
        .grad_x_hat = grad.grad_x_hat,
        .grad_x_hat_per_image = grad.grad_x_hat_per_image,
        .grad_mse = grad.grad_mse,
        .two_over_elements = 2.0 / elements,
        .stages = plan.stages,
        .row_work = plan.rows,
        .col_work = plan.cols,
        .cols_first = plan.cols_first,
        .first_blocks = checked_blocks(plan.cols_first ? col_blocks : row_blocks),
        .grad_x_by_rows = plan.x_by_rows ? grad.grad_x : nullptr,
        .grad_x_by_cols = plan.x_by_cols ? grad.grad_x : nullptr,
        .grad_a = target(grad.grad_a, rows, row_sums),
        .grad_b = target(grad.grad_b, cols, col_sums)};
    variant.launch(checked_blocks(row_blocks + col_blocks), plan.shared_bytes, stream, params);
    const auto add_up = [&](const Partials& partials, const float* sums, void* result) {
        if (!result || partials.count == 1) return;
        with_element(p.type, [&](auto element) {
            sum_partials<decltype(element)>(partials, sums, result, stream);
        });
    };
    add_up(rows, row_sums, grad.grad_a);
    add_up(cols, col_sums, grad.grad_b);
}

}  // namespace mfops::cuda
