// Asking for memory ahead, where the hardware's own prefetcher stops at the end of a page.
#pragma once

#include <type_traits>

namespace lminf::cpu {

// Whether memory that a step reads once is asked for as such, so that it does not push out what
// onnxruntime has in the caches: a step streams more than they hold, and between two products
// onnxruntime reads nodes, values and small weights. AMD's processors stream as fast that way.
// Intel's servers keep such lines out of the second-level cache and stream half as fast, so there
// and elsewhere it is asked for like any other. (docs/cpu_kernel.md has the measurement.)
extern bool asksForOnce;

}  // namespace lminf::cpu

// Of each instruction set's own, as in simd.h.
namespace {

// Asks for a line of memory that a step reads once.
template <bool kOnce>
inline void askFor(const void* p) {
  __builtin_prefetch(p, 0, kOnce ? 0 : 3);
}

inline void askFor(const void* p) { lminf::cpu::asksForOnce ? askFor<true>(p) : askFor<false>(p); }

// Calls function(once), a constant, for loops in which a branch would cost.
template <typename Function>
inline void asking(Function function) {
  lminf::cpu::asksForOnce ? function(std::true_type{}) : function(std::false_type{});
}

}  // namespace
