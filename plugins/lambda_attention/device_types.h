// 16-bit storage types; arithmetic on them goes through float.
#pragma once

#include <cstdint>

namespace lminf {

struct Half {
  std::uint16_t bits;
};

struct Bfloat16 {
  std::uint16_t bits;
};

}  // namespace lminf
