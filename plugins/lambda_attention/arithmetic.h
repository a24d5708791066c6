// The rules of docs/operator.md as arithmetic that host and device share.
//
// Absolute positions are int64 here and nowhere else: everything a kernel's inner loop sees is
// counted from past_length (steps, relative positions) or from the first live key (key numbers)
// and fits int32.
#pragma once

#include <cstdint>

#include "divisor.h"

namespace lminf {

LMINF_HD std::int64_t floorMod(std::int64_t value, std::int64_t modulus) {
  const std::int64_t rest = value % modulus;
  return rest < 0 ? rest + modulus : rest;
}

// The ring slot of a position from 0 on.
LMINF_HD int slotOf(std::int64_t position, const Divisor& capacity) {
  if (position <= INT32_MAX) return static_cast<int>(position) % capacity;
  return static_cast<int>(position % capacity.value);
}

template <class Number>
LMINF_HD constexpr Number smaller(Number a, Number b) {
  return a < b ? a : b;
}

template <class Number>
LMINF_HD Number larger(Number a, Number b) {
  return a > b ? a : b;
}

template <class Number>
LMINF_HD constexpr Number ceilDiv(Number value, Number divisor) {
  return (value + divisor - 1) / divisor;
}

// Real tokens of a row, clamped to 0 ... S.
LMINF_HD int realTokens(std::int64_t newLength, int sequenceLength) {
  return static_cast<int>(
      larger<std::int64_t>(0, smaller<std::int64_t>(newLength, sequenceLength)));
}

// How many sink tokens a query at a position sees: j < N with position - j >= W.
LMINF_HD int visibleSinks(std::int64_t position, std::int64_t windowSize, int numSinkTokens) {
  const std::int64_t left = position - windowSize + 1;
  return static_cast<int>(larger<std::int64_t>(0, smaller<std::int64_t>(left, numSinkTokens)));
}

// The keys that the queries of some steps of one row can see, as two numbered lists:
// sinks 0 ... sinkCount - 1, and ring keys 0 ... ringCount - 1 at consecutive positions.
struct KeySpan {
  int sinkCount;
  int ringCount;
  int firstSlot;      // ring slot of ring key 0; key k is in slot firstSlot + k, less C once
  int firstRelative;  // position of ring key 0, less past_length; may be negative
};

// The span of steps firstStep ... lastStep (less the padded ones). A step's position is
// past + step. Empty if no step is real, and if none has a position from 0 on: no past is below 0,
// but what a caller says by mistake must not lead out of the ring.
LMINF_HD KeySpan keySpan(std::int64_t past, int realSteps, int firstStep, int lastStep,
                         std::int64_t windowSize, int numSinkTokens, const Divisor& capacity) {
  KeySpan span{0, 0, 0, 0};
  lastStep = smaller(lastStep, realSteps - 1);
  const std::int64_t end = past + lastStep + 1;
  if (lastStep < firstStep || end < 0) return span;
  std::int64_t first = past + firstStep - windowSize + 1;
  // Positions before the ring's oldest are gone; with C >= W + S - 1 no query sees them.
  first = larger<std::int64_t>(first, past + realSteps - capacity);
  first = larger<std::int64_t>(first, 0);
  span.ringCount = static_cast<int>(end - first);
  span.firstSlot = slotOf(first, capacity);
  span.firstRelative = static_cast<int>(first - past);
  span.sinkCount = visibleSinks(end - 1, windowSize, numSinkTokens);
  return span;
}

LMINF_HD int ringSlot(int firstSlot, int keyNumber, int capacity) {
  const int slot = firstSlot + keyNumber;
  return slot >= capacity ? slot - capacity : slot;
}

// The keys low ... high (numbers in a span's list) that one query sees; none if low > high.
struct KeyRange {
  int low;
  int high;
};

LMINF_HD KeyRange noKeys() { return {1 << 30, -1}; }

LMINF_HD KeyRange visibleRingKeys(const KeySpan& span, int step, int windowLimit) {
  return {larger(step - windowLimit + 1 - span.firstRelative, 0),
          smaller(step - span.firstRelative, span.ringCount - 1)};
}

// The first tile of a split, or behind the last: splits are as even as can be, the last ones have
// one more. So the last split has the last tile, if there is any.
LMINF_HD int splitBegin(int tiles, int split, const Divisor& splits) {
  const int each = tiles / splits, rest = tiles - each * splits.value;
  return each * split + larger(split - (splits.value - rest), 0);
}

// Which dimension a rotated dimension is paired with, its row in the tables, and the sign of sin:
// x[d] becomes x[d] * cos[pair] + sign * x[partner] * sin[pair].
struct RotaryPair {
  int partner;
  int pair;
  float sign;
};

LMINF_HD RotaryPair rotaryPair(int dim, int rotaryDim, bool interleaved) {
  if (interleaved) return {dim ^ 1, dim >> 1, (dim & 1) ? 1.0f : -1.0f};
  const int half = rotaryDim >> 1;
  if (dim < half) return {dim + half, dim, -1.0f};
  return {dim - half, dim - half, 1.0f};
}

// The factor by which a sum taken relative to one maximum is carried to a larger one.
// Maxima are in units of log2; an empty sum has maximum -inf and total 0.
struct SoftmaxPart {
  float maximum;
  float total;
};

LMINF_HD float finiteMaximum(float maximum) { return maximum > -3.0e38f ? maximum : 0.0f; }

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kLargestWindow = 1 << 30;

}  // namespace lminf
