// Compiles every kernel of one type that finds factors.
#pragma once

#include <array>
#include <iterator>
#include <utility>

#include "cuda/factorize/variants.h"

namespace mfops::cuda {

template <Type kType, bool kTransposed>
struct CompiledFactors {
    using T = Element<kType>;
    using Shapes = ColumnShapes<sizeof(T)>;

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

    template <Family kFamily, Ending kEnding>
    struct Round {
        template <ColumnShape s>
        static constexpr RoundVariant of() {
            using Places =
                RoundPlaces<kType, kTransposed, kFamily, kEnding, s.own, s.rank, s.pixels>;
            return {s,
                    [](int rank, int64_t channels, int stages) {
                        const Places at{padded_16(rank), stages, static_cast<int>(channels)};
                        return at.elements() * sizeof(T);
                    },
                    launch_blocks<
                        round_kernel<kType, kTransposed, kFamily, kEnding, s.own, s.rank, s.pixels>,
                        RoundParams>};
        }
    };

    template <bool kWideZ>
    struct Share {
        template <ColumnShape s>
        static constexpr ShareVariant of() {
            using Places = SharePlaces<kType, kTransposed, kWideZ, s.own, s.pixels>;
            return {s,
                    [](int set, int stages) { return Places{set, stages}.elements() * sizeof(T); },
                    launch_blocks<share_kernel<kType, kTransposed, kWideZ, s.own, s.rank, s.pixels>,
                                  ShareParams>};
        }
    };

    struct Backward {
        template <ColumnShape s>
        static constexpr NmfBackwardVariant of() {
            using Places = NmfBackwardPlaces<kType, kTransposed, s.own, s.pixels>;
            return {s,
                    [](int rank, int64_t channels, int stages, bool whole, bool two) {
                        const Places at{padded_16(rank), stages, static_cast<int>(channels), whole,
                                        two};
                        return at.elements() * sizeof(T);
                    },
                    launch_blocks<nmf_backward_kernel<kType, kTransposed, s.own, s.rank, s.pixels>,
                                  NmfBackwardParams>};
        }
    };

    // Kernel::of<shape>() for each shape of a table.
    template <class Kernel, const auto& kShapes>
    static auto each() {
        static constexpr auto kVariants = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
            return std::array{Kernel::template of<kShapes[kIndex]>()...};
        }(std::make_index_sequence<std::size(kShapes)>());
        return std::span(kVariants);
    }

    template <Family kFamily>
    static FamilyVariants family() {
        FamilyVariants variants;
        variants.rounds = each<Round<kFamily, Ending::kRound>, Shapes::kRound>();
        variants.coefficients =
            each<Round<kFamily, Ending::kCoefficients>, Shapes::kCoefficients>();
        if constexpr (kWide<kType, kFamily>) {
            variants.shares = each<Share<true>, Shapes::kWideShares>();
        } else {
            variants.shares = each<Share<false>, Shapes::kShares>();
        }
        if constexpr (kFamily == Family::kNmf) {
            variants.last = each<Round<kFamily, Ending::kFeatures>, Shapes::kRound>();
        }
        return variants;
    }

    static FactorVariants all() {
        FactorVariants variants{family<Family::kMeans>(), family<Family::kNmf>(),
                                each<Backward, Shapes::kBackward>(),
                                launch_blocks<gram_kernel<kType>, GramParams>};
        if constexpr (kType == Type::kBf16) {
            variants.resident_em =
                launch_cluster<resident_kernel<kType, kTransposed, Family::kMeans>>;
        }
        if constexpr (sizeof(T) == 2) {
            variants.resident_nmf =
                launch_cluster<resident_kernel<kType, kTransposed, Family::kNmf>>;
        }
        return variants;
    }
};

template <Type kType>
FactorVariants compiled_factor_variants(bool transposed) {
    return transposed ? CompiledFactors<kType, true>::all() : CompiledFactors<kType, false>::all();
}

}  // namespace mfops::cuda
