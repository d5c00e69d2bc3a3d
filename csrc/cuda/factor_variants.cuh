// Compiles every kernel of one type that finds factors.
#pragma once

#include <algorithm>
#include <iterator>
#include <utility>

#include "cuda/factor_variants.h"

namespace mfops::cuda {

template <Type kType, bool kTransposed>
struct CompiledFactors {
    static constexpr auto& kShapes = ColumnShapes<sizeof(Element<kType>)>::kAll;

    template <auto Kernel, class Params>
    static void launch_blocks(unsigned blocks, size_t shared_bytes, void* stream,
                              const Params& params) {
        launch<Kernel>(blocks, kThreads, shared_bytes, stream, params);
    }

    template <auto Kernel>
    static void launch_cluster(unsigned blocks, size_t shared_bytes, void* stream,
                               const ResidentParams& params) {
        launch_clusters<Kernel>(blocks, kCluster, kResidentThreads, shared_bytes, stream, params);
    }

    // Where 64 rows of Z Z^T take many registers those of X Z^T take fewer.
    static constexpr ColumnShape with_gram(Family family, Ending ending, ColumnShape shape) {
        const bool gram = family == Family::kNmf && ending == Ending::kRound;
        if (gram && shape.rank > 64) shape.own = std::min(shape.own, 64);
        return shape;
    }

    template <class Places>
    static size_t shared_bytes_of(int rank, int64_t channels, int stages, bool whole, bool two) {
        const Places at{padded_16(rank), stages, static_cast<int>(channels), whole, two};
        return at.elements() * sizeof(Element<kType>);
    }

    template <Family kFamily, Ending kEnding, size_t kIndex>
    static constexpr RoundVariant round() {
        constexpr ColumnShape s = with_gram(kFamily, kEnding, kShapes[kIndex]);
        return {s, shared_bytes_of<RoundPlaces<kType, kTransposed, kFamily, s.own, s.pixels>>,
                launch_blocks<
                    round_kernel<kType, kTransposed, kFamily, kEnding, s.own, s.rank, s.pixels>,
                    RoundParams>};
    }

    template <size_t kIndex>
    static constexpr NmfBackwardVariant backward() {
        constexpr ColumnShape s = kShapes[kIndex];
        return {s, shared_bytes_of<NmfBackwardPlaces<kType, kTransposed, s.own, s.pixels>>,
                launch_blocks<nmf_backward_kernel<kType, kTransposed, s.own, s.rank, s.pixels>,
                              NmfBackwardParams>};
    }

    template <size_t... kIndex>
    static FactorVariants all(std::index_sequence<kIndex...>) {
        static constexpr RoundVariant means[] = {
            round<Family::kMeans, Ending::kRound, kIndex>()...};
        static constexpr RoundVariant nmf[] = {round<Family::kNmf, Ending::kRound, kIndex>()...};
        static constexpr RoundVariant nmf_last[] = {
            round<Family::kNmf, Ending::kFeatures, kIndex>()...};
        static constexpr NmfBackwardVariant nmf_backward[] = {backward<kIndex>()...};
        FactorVariants variants{means, nmf, nmf_last, nmf_backward,
                                launch_blocks<gram_kernel<kType>, GramParams>};
        if constexpr (kType == Type::kBf16) {
            variants.resident_em =
                launch_cluster<resident_kernel<kType, kTransposed, Family::kMeans>>;
        }
        if constexpr (sizeof(Element<kType>) == 2) {
            variants.resident_nmf =
                launch_cluster<resident_kernel<kType, kTransposed, Family::kNmf>>;
        }
        return variants;
    }
};

template <Type kType>
FactorVariants compiled_factor_variants(bool transposed) {
    constexpr auto indices =
        std::make_index_sequence<std::size(ColumnShapes<sizeof(Element<kType>)>::kAll)>();
    return transposed ? CompiledFactors<kType, true>::all(indices)
                      : CompiledFactors<kType, false>::all(indices);
}

}  // namespace mfops::cuda
