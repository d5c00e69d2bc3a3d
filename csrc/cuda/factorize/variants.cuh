// Compiles every kernel of one type that finds factors.
#pragma once

#include "cuda/factorize/variants.h"

namespace mfops::cuda {

template <Type kType, bool kTransposed>
struct CompiledFactors {
    using T = Element<kType>;
    using Shapes = ColumnShapes<sizeof(T)>;

    template <auto Kernel>
    static void launch_cluster(unsigned blocks, size_t shared_bytes, void* stream,
                               const PersistentParams& params) {
        launch_clusters<Kernel>(blocks, kClusterBlocks, kClusterThreads, shared_bytes, stream,
                                params);
    }

    template <Family kFamily, Epilogue kEpilogue>
    struct Round {
        template <ColumnShape s>
        static constexpr RoundVariant of() {
            using Layout =
                RoundLayout<kType, kTransposed, kFamily, kEpilogue, s.own, s.rank, s.pixels>;
            return {
                s,
                [](int rank, int64_t channels, int stages) {
                    const Layout at{padded_16(rank), stages, static_cast<int>(channels)};
                    return at.elements() * sizeof(T);
                },
                launch_blocks<
                    round_kernel<kType, kTransposed, kFamily, kEpilogue, s.own, s.rank, s.pixels>,
                    kThreads, RoundParams>};
        }
    };

    template <bool kWideZ>
    struct Partial {
        template <ColumnShape s>
        static constexpr PartialsVariant of() {
            using Layout = PartialsLayout<kType, kTransposed, kWideZ, s.own, s.pixels>;
            return {
                s, [](int set, int stages) { return Layout{set, stages}.elements() * sizeof(T); },
                launch_blocks<partials_kernel<kType, kTransposed, kWideZ, s.own, s.rank, s.pixels>,
                              kThreads, PartialsParams>};
        }
    };

    struct Backward {
        template <ColumnShape s>
        static constexpr NmfBackwardVariant of() {
            using Layout = NmfBackwardLayout<kType, kTransposed, s.own, s.pixels>;
            return {s,
                    [](int rank, int64_t channels, int stages, bool whole, bool two) {
                        const Layout at{padded_16(rank), stages, static_cast<int>(channels), whole,
                                        two};
                        return at.elements() * sizeof(T);
                    },
                    launch_blocks<nmf_backward_kernel<kType, kTransposed, s.own, s.rank, s.pixels>,
                                  kThreads, NmfBackwardParams>};
        }
    };

    template <Family kFamily>
    static FamilyVariants family() {
        FamilyVariants variants;
        variants.rounds = compiled_for_each<Round<kFamily, Epilogue::kRound>, Shapes::kRound>();
        variants.coefficients =
            compiled_for_each<Round<kFamily, Epilogue::kCoefficients>, Shapes::kCoefficients>();
        if constexpr (kWide<kType, kFamily>) {
            variants.partials = compiled_for_each<Partial<true>, Shapes::kWidePartials>();
        } else {
            variants.partials = compiled_for_each<Partial<false>, Shapes::kPartials>();
        }
        if constexpr (kFamily == Family::kNmf) {
            variants.last =
                compiled_for_each<Round<kFamily, Epilogue::kFeatures>, Shapes::kRound>();
        }
        return variants;
    }

    static FactorVariants all() {
        FactorVariants variants{family<Family::kMeans>(), family<Family::kNmf>(),
                                compiled_for_each<Backward, Shapes::kBackward>(),
                                launch_blocks<gram_kernel<kType>, kThreads, GramParams>};
        if constexpr (kType == Type::kBf16) {
            variants.persistent_em =
                launch_cluster<persistent_kernel<kType, kTransposed, Family::kMeans>>;
        }
        if constexpr (sizeof(T) == 2) {
            variants.persistent_nmf =
                launch_cluster<persistent_kernel<kType, kTransposed, Family::kNmf>>;
        }
        return variants;
    }
};

template <Type kType>
FactorVariants compiled_factor_variants(bool transposed) {
    return transposed ? CompiledFactors<kType, true>::all() : CompiledFactors<kType, false>::all();
}

}  // namespace mfops::cuda
