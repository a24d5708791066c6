// Storage types; arithmetic on them goes through float, or through a type that holds them exactly.
#pragma once

#include <cstdint>

namespace lminf {

struct Half {
  std::uint16_t bits;
};

struct Bfloat16 {
  std::uint16_t bits;
};

// What a ring of int8 holds: a number of -127 ... 127, to be multiplied by its row's scale.
struct Int8 {
  std::int8_t value;
};

}  // namespace lminf
