// A kernel compiled for each shape of a table, and how it is launched.
#pragma once

#include <array>
#include <cstddef>
#include <iterator>
#include <span>
#include <utility>

#include "cuda/common/primitives.cuh"
#include "cuda/common/types.h"

namespace mfops::cuda {

template <class Params>
using Launch = void (*)(unsigned blocks, size_t shared_bytes, void* stream, const Params&);

template <auto Kernel, unsigned kThreads, class Params>
void launch_blocks(unsigned blocks, size_t shared_bytes, void* stream, const Params& params) {
    launch<Kernel>(blocks, kThreads, shared_bytes, stream, params);
}

// Kernel::of<shape>() for each shape of a table.
template <class Kernel, const auto& kShapes>
auto compiled_for_each() {
    static constexpr auto kVariants = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
        return std::array{Kernel::template of<kShapes[kIndex]>()...};
    }(std::make_index_sequence<std::size(kShapes)>());
    return std::span(kVariants);
}

// f(an element) of the type in which X lies in memory.
template <class F>
void with_element(Type type, F f) {
    switch (type) {
        case Type::kBf16:
            return f(bf16{});
        case Type::kF16:
            return f(f16{});
        default:
            return f(float{});
    }
}

}  // namespace mfops::cuda
