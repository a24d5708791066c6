// Activations rounded to int8 block by block, and their layout. Compiled once per instruction set.
//
// A rounded token holds for every block its scale (float) and where its sum begins (int32), kWidth
// blocks together; then the integers, ordered as the row's (int8_vectors.h): of 4 bits, those of
// the low halves of a chunk before those of the high ones.
#pragma once

#include <algorithm>

#include "int8_vectors.h"
#include "linear.h"

namespace {

using lminf::cpu::Blocks;
using lminf::cpu::Linear;

constexpr int64_t kMostBlock = 256;

// Blocks of a row, and chunks of their bytes, with those that fill the last kWidth.
inline int64_t paddedBlocks(const Blocks& b) { return (b.perRow + kWidth - 1) / kWidth * kWidth; }
inline int64_t chunksOf(const Blocks& b) { return paddedBlocks(b) * b.bytes() / kChunk; }

// One rounded token.
struct Token {
  const float* scales;
  const int32_t* starts;
  const int8_t* values;
};

inline size_t tokenBytes(const Blocks& b) {
  const int64_t bytes = 8 * paddedBlocks(b) + chunksOf(b) * kChunk * 8 / b.bits;
  return static_cast<size_t>((bytes + 63) / 64 * 64);
}

inline Token tokenAt(const Linear& p, int64_t token) {
  const int64_t blocks = paddedBlocks(*p.blocks);
  const uint8_t* start = p.int8Tokens + token * tokenBytes(*p.blocks);
  return {reinterpret_cast<const float*>(start), reinterpret_cast<const int32_t*>(start) + blocks,
          reinterpret_cast<const int8_t*>(start) + 8 * blocks};
}

inline float largestOf(const float* x, int64_t count) {
  Vec most{};
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Vec v = load(x + i);
    most = maximum(most, v < 0.0f ? -v : v);
  }
  float largest = maximumOf(most);
  for (; i < count; ++i) largest = std::max(largest, std::fabs(x[i]));
  return largest;
}

// Each lane's nearest integer, ties to even.
inline IntVec nearest(Vec v) {
#if defined(LMINF_SIMD)
  return reinterpret_cast<IntVec>(LMINF_SIMD(cvtps_epi32)(v));
#else
  IntVec out;
  for (int i = 0; i < kWidth; ++i) out[i] = static_cast<int32_t>(std::lrint(v[i]));
  return out;
#endif
}

// Rounds one block (count ≤ size elements) to the nearest integers; returns the scale. The product
// is rounded before it is made an integer: ties, of which embeddings of few bits have many, then
// fall as in onnxruntime.
inline float roundBlock(const float* x, int64_t count, int8_t* out) {
  const float largest = largestOf(x, count);
  // Of numbers this small the reciprocal would be infinite.
  const float divisor = largest < 0x1p-100f ? 0.0f : 127.0f / largest;
  typedef int8_t Narrow __attribute__((vector_size(kWidth)));
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Narrow narrow = __builtin_convertvector(nearest(load(x + i) * divisor), Narrow);
    std::memcpy(out + i, &narrow, sizeof narrow);
  }
  for (; i < count; ++i) out[i] = static_cast<int8_t>(nearest(splat(x[i] * divisor))[0]);
  return largest / 127.0f;
}

void roundToken(const Blocks& b, const float* x, int64_t length, uint8_t* out, int8_t* scratch) {
  const int64_t chunks = chunksOf(b), blocks = paddedBlocks(b), perChunk = kChunk * 8 / b.bits;
  float* scales = reinterpret_cast<float*>(out);
  int32_t* starts = reinterpret_cast<int32_t*>(out) + blocks;
  int8_t* values = reinterpret_cast<int8_t*>(out) + 8 * blocks;
  std::memset(out, 0, 8 * blocks);
  int8_t* plain = b.bits == 4 ? scratch : values;
  std::fill(plain + length, plain + chunks * perChunk, int8_t{0});
  // The integers of symmetric weights stand for themselves less 2^(bits − 1).
  const int32_t zero = b.zeroPoints != nullptr ? 1 : b.bits == 4 ? 8 : 128;
  for (int64_t block = 0; block < b.perRow; ++block) {
    const int64_t first = block * b.size, count = std::min(b.size, length - first);
    scales[block] = roundBlock(x + first, count, plain + first);
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += plain[first + i];
    starts[block] = -zero * sum;
  }
  if (b.bits == 8) return;
  for (int64_t chunk = 0; chunk < chunks; ++chunk, plain += perChunk, values += perChunk) {
    for (int64_t i = 0; i < kChunk; ++i) values[i] = plain[2 * i];
    for (int64_t i = 0; i < kChunk; ++i) values[kChunk + i] = plain[2 * i + 1];
  }
}

void roundFloats(const Blocks& b, const float* x, int64_t length, float* out) {
  int8_t rounded[kMostBlock];
  for (int64_t first = 0; first < length; first += b.size) {
    const int64_t count = std::min(b.size, length - first);
    const float scale = roundBlock(x + first, count, rounded);
    for (int64_t i = 0; i < count; ++i) out[first + i] = static_cast<float>(rounded[i]) * scale;
  }
}

}  // namespace
