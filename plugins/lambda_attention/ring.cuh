// What a ring holds: elements of the model's type T, or bytes with a float scale for each row.
//
// The bytes of int8 are numbers that both 16-bit types hold exactly, so they go through tensor
// cores as they are: a key's scale multiplies its products, a value's scale its weights.
#pragma once

#include "kernel_arguments.h"
#include "row.cuh"

namespace lminf {

template <class T, class Ring>
struct IsSame {
  static constexpr bool value = false;
};
template <class T>
struct IsSame<T, T> {
  static constexpr bool value = true;
};

// Whether a ring rounds what it holds.
template <class T, class Ring>
LMINF_HD constexpr bool isRounded() {
  return !IsSame<T, Ring>::value;
}

// Weights times scales become 16-bit numbers. A value's scale is at most 65504 / 127 where T is
// float16, and usually well below 1, so weights are held 2^6 times as large, as if every maximum
// were lower: the largest product still fits, and the small ones keep their bits.
template <class T, class Ring>
LMINF_HD constexpr float weightShift() {
  return isRounded<T, Ring>() && IsSame<T, Half>::value ? 6.0f : 0.0f;
}

constexpr float kInt8Limit = 127.0f;

// The float of byte i of a word whose bytes are int8 plus 128: 2^23 + byte, less 2^23 + 128.
__device__ __forceinline__ float floatOfByte(std::uint32_t biased, std::uint32_t i) {
  return bitsToFloat(selectBytes(biased, 0x4b000000u, 0x7540u | i)) - 8388736.0f;
}

// Bytes 0, 1 of a word (or 2, 3 where `upper`) as a pair of T; int8 plus 128 comes in.
template <class T>
__device__ __forceinline__ std::uint32_t pairOfBytes(std::uint32_t biased, bool upper) {
  const std::uint32_t first = upper ? 2u : 0u;
  return packPair<T>(floatOfByte(biased, first), floatOfByte(biased, first + 1));
}
// 1024 + byte is a float16 whose last bits are the byte; 1152 less it is the number.
template <>
__device__ __forceinline__ std::uint32_t pairOfBytes<Half>(std::uint32_t biased, bool upper) {
  const std::uint32_t above = selectBytes(biased, 0x64646464u, upper ? 0x4342u : 0x4140u);
  return subtractHalves(above, 0x64806480u);
}

// Bytes in the first registers become elements of T in all of them.
template <class T, int count>
__device__ __forceinline__ void expandBytes(Packed<count>& packed) {
  std::uint32_t biased[count == 8 ? 2 : 1];
  biased[0] = packed.word[0] ^ 0x80808080u;
  if constexpr (count == 8) biased[1] = packed.word[1] ^ 0x80808080u;
#pragma unroll
  for (int word = 0; word < count / 2; ++word) {
    packed.word[word] = pairOfBytes<T>(biased[word / 2], word % 2 != 0);
  }
}

// The scale of a row whose largest element is known.
__device__ __forceinline__ float int8Scale(float largest) { return largest / kInt8Limit; }

// The nearest integer of -127 ... 127, ties to even; a row of zeros has scale 0.
__device__ __forceinline__ Int8 toInt8(float x, float scale) {
  const float steps = rintf(x / (scale == 0.0f ? 1.0f : scale));
  return {static_cast<std::int8_t>(fmaxf(-kInt8Limit, fminf(kInt8Limit, steps)))};
}

// An element as a float, without its row's scale.
template <class Ring>
__device__ __forceinline__ float ringElement(const void* ring, std::int64_t at) {
  return toFloat(static_cast<const Ring*>(ring)[at]);
}
template <>
__device__ __forceinline__ float ringElement<Int8>(const void* ring, std::int64_t at) {
  return static_cast<float>(static_cast<const Int8*>(ring)[at].value);
}

}  // namespace lminf
