// Rows of a weight in blocks as floats, compiled once per instruction set.
#pragma once

#include "linear.h"
#include "simd.h"

namespace {

using lminf::cpu::Blocks;

// 16 integers as floats.
inline void integersOf4(const uint8_t* packed, float* out) {
#if defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
  const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
  const __m128i order = _mm_unpacklo_epi8(low, high);
  for (int i = 0; i < 2; ++i) {
    const __m128i half = i == 0 ? order : _mm_unpackhi_epi64(order, order);
    _mm256_storeu_ps(out + 8 * i, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(half)));
  }
#else
  for (int i = 0; i < 8; ++i) {
    out[2 * i] = static_cast<float>(packed[i] & 15);
    out[2 * i + 1] = static_cast<float>(packed[i] >> 4);
  }
#endif
}

inline void integersOf8(const uint8_t* packed, float* out) {
  for (int i = 0; i < 16; ++i) out[i] = static_cast<float>(packed[i]);
}

inline float zeroPoint(const Blocks& b, int64_t row, int64_t block) {
  if (b.zeroPoints == nullptr) return b.bits == 4 ? 8.0f : 128.0f;
  const uint8_t* zeros = b.zeroPoints + row * b.zeroBytes();
  if (b.bits == 8) return static_cast<float>(zeros[block]);
  return static_cast<float>(zeros[block / 2] >> 4 * (block % 2) & 15);
}

// The scale of a row's block.
inline float scaleAt(const Blocks& b, int64_t row, int64_t block) {
  const int64_t at = row * b.perRow + block;
  if (b.scaleType == lminf::DataType::kFloat32) return static_cast<const float*>(b.scales)[at];
  return toFloat(static_cast<const Half*>(b.scales)[at]);
}

// Blocks firstBlock … firstBlock + count − 1 of `rows` rows, padding included.
inline void dequantizeRows(const Blocks& b, int64_t firstRow, int64_t rows, int64_t firstBlock,
                           int64_t count, float* out, int64_t stride) {
  const int64_t step = 2 * b.bits;  // bytes of 16 integers
  for (int64_t row = firstRow; row < firstRow + rows; ++row, out += stride) {
    float* to = out;
    for (int64_t block = firstBlock; block < firstBlock + count; ++block) {
      const uint8_t* packed = b.packed + row * b.rowBytes() + block * b.bytes();
      const Vec scale = splat(scaleAt(b, row, block));
      const Vec zero = splat(zeroPoint(b, row, block));
      for (int64_t i = 0; i < b.size; i += 16, packed += step, to += 16) {
        alignas(64) float integers[16];
        b.bits == 4 ? integersOf4(packed, integers) : integersOf8(packed, integers);
        for (int j = 0; j < 16; j += kWidth) store(to + j, (load(integers + j) - zero) * scale);
      }
    }
  }
}

}  // namespace
