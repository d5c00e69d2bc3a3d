// Compiles every kernel of one type.
#pragma once

#include <iterator>
#include <utility>

#include "cuda/reconstruct/variants.h"

namespace mfops::cuda {

template <Type kType, bool kTransposed, bool kShared>
struct Compiled {
    using Table = Shapes<sizeof(Element<kType>), kShared>;

    template <size_t kIndex>
    static constexpr ForwardVariant forward() {
        constexpr TileShape s = Table::kForward[kIndex];
        return {s, forward_shared_bytes<Tiles<kType, kTransposed, s.own, s.stream, s.warps>>,
                launch_blocks<
                    forward_kernel<kType, kTransposed, kShared, s.own, s.stream, s.warps, s.blocks>,
                    s.warps, ForwardParams>};
    }

    template <size_t kIndex>
    static constexpr BackwardVariant backward() {
        constexpr TileShape s = Table::kBackward[kIndex];
        return {s, backward_shared_bytes<kType, kTransposed, s.own, s.stream, s.warps>,
                launch_blocks<backward_kernel<kType, kTransposed, kShared, s.own, s.stream,
                                              s.max_rank, s.warps, s.blocks>,
                              s.warps, BackwardParams>};
    }

    template <size_t... kForward, size_t... kBackward>
    static Variants all(std::index_sequence<kForward...>, std::index_sequence<kBackward...>) {
        static constexpr ForwardVariant forward_variants[] = {forward<kForward>()...};
        static constexpr BackwardVariant backward_variants[] = {backward<kBackward>()...};
        return {forward_variants, backward_variants};
    }

    static Variants all() {
        return all(std::make_index_sequence<std::size(Table::kForward)>(),
                   std::make_index_sequence<std::size(Table::kBackward)>());
    }

   private:
    template <auto Kernel, int kWarps, class Params>
    static void launch_blocks(unsigned blocks, size_t shared_bytes, void* stream,
                              const Params& params) {
        launch<Kernel>(blocks, 32 * kWarps, shared_bytes, stream, params);
    }
};

template <Type kType>
Variants compiled_variants(bool transposed, bool shared) {
    return transposed
               ? shared ? Compiled<kType, true, true>::all() : Compiled<kType, true, false>::all()
           : shared ? Compiled<kType, false, true>::all()
                    : Compiled<kType, false, false>::all();
}

}  // namespace mfops::cuda
