// Compiles every kernel of one type.
#pragma once

#include <iterator>
#include <utility>

#include "cuda/variants.h"

namespace mfops::cuda {

template <Type kType, bool kTransposed, bool kAligned>
struct Compiled {
    using Table = Shapes<sizeof(Element<kType>)>;

    template <size_t kIndex>
    static constexpr ForwardVariant forward() {
        constexpr TileShape s = Table::kForward[kIndex];
        return {
            s, forward_shared_bytes<Tiles<kType, kTransposed, kAligned, s.own, s.stream>>,
            launch_blocks<forward_kernel<kType, kTransposed, kAligned, s.own, s.stream, s.blocks>,
                          ForwardParams>};
    }

    template <size_t kIndex>
    static constexpr BackwardVariant backward() {
        // Lines of any alignment take registers that a second block would need.
        constexpr TileShape s =
            kAligned ? Table::kBackward[kIndex] : with_one_block(Table::kBackward[kIndex]);
        return {s, backward_shared_bytes<kType, kTransposed, s.own, s.stream>,
                launch_blocks<backward_kernel<kType, kTransposed, kAligned, s.own, s.stream,
                                              s.max_rank, s.blocks>,
                              BackwardParams>};
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
    static constexpr TileShape with_one_block(TileShape shape) {
        shape.blocks = 1;
        return shape;
    }

    template <auto Kernel, class Params>
    static void launch_blocks(unsigned blocks, size_t shared_bytes, void* stream,
                              const Params& params) {
        launch<Kernel>(blocks, kThreads, shared_bytes, stream, params);
    }
};

template <Type kType>
Variants compiled_variants(bool transposed, bool aligned) {
    return transposed
               ? aligned ? Compiled<kType, true, true>::all() : Compiled<kType, true, false>::all()
           : aligned ? Compiled<kType, false, true>::all()
                     : Compiled<kType, false, false>::all();
}

}  // namespace mfops::cuda
