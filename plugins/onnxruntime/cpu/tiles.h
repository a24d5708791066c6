// Tiles of keys and values, and their other layouts. Compiled once per instruction set.
#pragma once

#include <cstring>

#include "simd.h"

namespace {

// Keys of a tile. A few rows stream long runs of keys from memory; many rows want the tile, and
// what they waste at the diagonal, small.
constexpr int64_t kLongTile = 256;
constexpr int64_t kShortTile = 64;
constexpr int64_t kManyRows = 16;  // from here on a tile of keys is worth transposing

inline int64_t tileOf(int64_t rows) { return rows < kManyRows ? kLongTile : kShortTile; }

// Some keys of one tile: stored one after another, all of the ring or all sinks.
template <typename T>
struct Tile {
  const T* key;
  const T* value;
  int64_t count;
  int64_t position;  // of the first key
  bool sink;
};

// Copies count rows of dim elements to floats with a padded stride, zeros behind.
template <typename T>
void widen(const T* source, int64_t dim, int64_t count, int64_t stride, float* out) {
  for (int64_t k = 0; k < count; ++k) {
    int64_t d = 0;
    for (; d + kWidth <= dim; d += kWidth) store(out + k * stride + d, load(source + k * dim + d));
    for (; d < dim; ++d) out[k * stride + d] = toFloat(source[k * dim + d]);
    for (; d < stride; ++d) out[k * stride + d] = 0.0f;
  }
}

// out[d][k] = rows[k][d]; out has kShortTile columns, dim is a multiple of four.
inline void transpose(const float* rows, int64_t stride, int64_t dim, int64_t count, float* out) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    for (int64_t d = 0; d < dim; d += 4) {
      Vec4 a, b, c, e;
      std::memcpy(&a, rows + (k + 0) * stride + d, sizeof a);
      std::memcpy(&b, rows + (k + 1) * stride + d, sizeof b);
      std::memcpy(&c, rows + (k + 2) * stride + d, sizeof c);
      std::memcpy(&e, rows + (k + 3) * stride + d, sizeof e);
      transpose4(&a, &b, &c, &e);
      std::memcpy(out + (d + 0) * kShortTile + k, &a, sizeof a);
      std::memcpy(out + (d + 1) * kShortTile + k, &b, sizeof b);
      std::memcpy(out + (d + 2) * kShortTile + k, &c, sizeof c);
      std::memcpy(out + (d + 3) * kShortTile + k, &e, sizeof e);
    }
  }
  for (; k < count; ++k) {
    for (int64_t d = 0; d < dim; ++d) out[d * kShortTile + k] = rows[k * stride + d];
  }
}

}  // namespace
