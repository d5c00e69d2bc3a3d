// Compiles every kernel of one type.
#pragma once

#include "cuda/reconstruct/variants.h"

namespace mfops::cuda {

template <Type kType, bool kTransposed, bool kShared>
struct Compiled {
    using Table = Shapes<sizeof(Element<kType>), kShared>;

    struct Forward {
        template <TileShape s>
        static constexpr ForwardVariant of() {
            return {
                s, forward_shared_bytes<Tiles<kType, kTransposed, s.own, s.stream, s.warps>>,
                launch_blocks<
                    forward_kernel<kType, kTransposed, kShared, s.own, s.stream, s.warps, s.blocks>,
                    32 * s.warps, ForwardParams>};
        }
    };

    struct Backward {
        template <TileShape s>
        static constexpr BackwardVariant of() {
            return {s, backward_shared_bytes<kType, kTransposed, s.own, s.stream, s.warps>,
                    launch_blocks<backward_kernel<kType, kTransposed, kShared, s.own, s.stream,
                                                  s.max_rank, s.warps, s.blocks>,
                                  32 * s.warps, BackwardParams>};
        }
    };

    static Variants all() {
        return {compiled_for_each<Forward, Table::kForward>(),
                compiled_for_each<Backward, Table::kBackward>()};
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
