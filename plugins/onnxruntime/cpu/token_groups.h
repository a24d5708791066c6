// Tokens in groups whose sums stay in registers. Compiled once per instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

namespace {

// Calls function(size) with the size as a constant.
template <int kSize, typename Function>
inline void withSize(int64_t size, Function function) {
  if (size == kSize) {
    function(std::integral_constant<int, kSize>{});
  } else if constexpr (kSize > 1) {
    withSize<kSize - 1>(size, function);
  }
}

// Calls function(n, first token) for all tokens in groups of about the same size, kMost at most; n
// is a constant.
template <int kMost, typename Function>
inline void forTokenGroups(int64_t first, int64_t end, Function function) {
  while (first < end) {
    const int64_t left = end - first, groups = (left + kMost - 1) / kMost;
    const int64_t size = (left + groups - 1) / groups;
    withSize<kMost>(size, [&](auto constant) { function(constant, first); });
    first += size;
  }
}

}  // namespace
