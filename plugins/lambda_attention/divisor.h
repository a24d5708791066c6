// Division by numbers that the host knows ahead of a launch: a multiplication and a shift, where a
// device divides in some twenty instructions that wait for each other.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lminf {

// A number that stands for itself, and the quotient and rest of an int from 0 on by it.
struct Divisor {
  int value;
  std::uint32_t multiplier;
  int shift;

  LMINF_HD operator int() const { return value; }  // NOLINT(google-explicit-constructor)
};

// Of a value from 1 on: shift = ceil(log2(value)), multiplier = floor(2^32 (2^shift - value) /
// value) + 1, so that 2^32 + multiplier is 2^(32 + shift) / value, rounded up. The error of the
// quotient is too small to matter for dividends below 2^32 (Granlund and Montgomery, 1994).
inline Divisor divisorOf(int value) {
  const auto divisor = static_cast<std::uint64_t>(value);
  int shift = 0;
  while ((std::uint64_t{1} << shift) < divisor) ++shift;
  const std::uint64_t excess = (std::uint64_t{1} << shift) - divisor;
  return {value, static_cast<std::uint32_t>((excess << 32) / divisor + 1), shift};
}

LMINF_HD int operator/(int dividend, const Divisor& divisor) {
  const auto number = static_cast<std::uint32_t>(dividend);
  const auto high =
      static_cast<std::uint32_t>(static_cast<std::uint64_t>(number) * divisor.multiplier >> 32);
  return static_cast<int>((high + number) >> divisor.shift);
}

LMINF_HD int operator%(int dividend, const Divisor& divisor) {
  return dividend - dividend / divisor * divisor.value;
}

// Wider dividends are divided by `value`.
int operator/(std::int64_t dividend, const Divisor& divisor) = delete;
int operator%(std::int64_t dividend, const Divisor& divisor) = delete;

}  // namespace lminf
