// The arithmetic of one attention block, compiled once per instruction set.
//
// Flash attention: keys pass in tiles, each row of logits lives only inside its tile, a running
// maximum and sum carry the softmax. All query heads of a key/value head share each tile.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention.h"
#include "int8.h"
#include "simd.h"

namespace {

using lminf::DataType;
using lminf::cpu::Item;
using lminf::cpu::Params;

// Keys of a tile. A few rows stream long runs of keys from memory; many rows want the tile, and
// what they waste at the diagonal, small.
constexpr int64_t kLongTile = 256;
constexpr int64_t kShortTile = 64;
constexpr int64_t kManyRows = 16;  // from here on a tile of keys is worth transposing
constexpr int64_t kFewRows = 3;    // up to here a row of values is taken whole, not in columns
constexpr int64_t kNearKeys = 16;  // so many keys stay in the first-level cache
constexpr int64_t kPairBytes = 256;
constexpr bool kFewRegisters = kWidth < 16;  // 16 of them: a row's sums must not stay in them
// Below any logit, and finite: what was never seen has weight exp(kHidden − maximum) = 0.
constexpr float kHidden = -1e30f;

inline int64_t roundUp(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
inline int64_t paddedDim(const Params& p) { return roundUp(p.headDim, kWidth); }
inline int64_t group(const Params& p) { return p.numHeads / p.numKvHeads; }

// --- rotation -----------------------------------------------------------------------------------

// out[i] = x rotated by one row of cos and sin, times factor; zeros up to the padded size.
template <typename In, typename Out>
void rotate(const Params& p, const In* x, const float* cos, const float* sin, float factor,
            Out* out) {
  const int64_t half = p.rotaryDim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const int64_t first = p.rotaryInterleaved != 0 ? 2 * i : i, second = p.rotaryInterleaved != 0 ? 2 * i + 1 : i + half;
    const float a = toFloat(x[first]), b = toFloat(x[second]);
    fromFloat((a * cos[i] - b * sin[i]) * factor, out + first);
    fromFloat((b * cos[i] + a * sin[i]) * factor, out + second);
  }
  for (int64_t i = p.rotaryDim; i < p.headDim; ++i) fromFloat(toFloat(x[i]) * factor, out + i);
}

// --- append -------------------------------------------------------------------------------------

template <typename T>
void appendHead(const Params& p, int64_t batch, int64_t kvHead) {
  const int64_t pair = batch * p.numKvHeads + kvHead, dim = p.headDim, half = p.rotaryDim / 2;
  const T* key = static_cast<const T*>(p.key) + pair * p.sequenceLength * dim;
  const T* value = static_cast<const T*>(p.value) + pair * p.sequenceLength * dim;
  T* sinkKey = static_cast<T*>(p.presentSinkKey);
  T* sinkValue = static_cast<T*>(p.presentSinkValue);
  const int64_t past = p.pastLength[batch];
  for (int64_t step = 0; step < p.newLength[batch]; ++step) {
    const int64_t position = past + step, slot = pair * p.capacity + position % p.capacity;
    const int64_t row = (batch * p.sequenceLength + step) * half;
    const T *newKey = key + step * dim, *newValue = value + step * dim;
    if (p.int8Cache) {
      int8_t* ringKey = static_cast<int8_t*>(p.presentKey) + slot * dim;
      int8_t* ringValue = static_cast<int8_t*>(p.presentValue) + slot * dim;
      p.presentKeyScale[slot] = quantizeRotated(p, newKey, p.cos + row, p.sin + row, ringKey);
      p.presentValueScale[slot] = quantizeRow(newValue, dim, ringValue);
    } else {
      T* ringKey = static_cast<T*>(p.presentKey) + slot * dim;
      rotate(p, newKey, p.cos + row, p.sin + row, 1.0f, ringKey);
      std::memcpy(static_cast<T*>(p.presentValue) + slot * dim, newValue, dim * sizeof(T));
    }
    if (position < p.numSinkTokens && sinkKey != nullptr && sinkValue != nullptr) {
      const int64_t sink = (pair * p.sinkSlots() + position) * dim;
      std::memcpy(sinkKey + sink, newKey, dim * sizeof(T));
      std::memcpy(sinkValue + sink, newValue, dim * sizeof(T));
    }
  }
}

void append(const Params& p, int64_t batch, int64_t kvHead) {
  p.dataType == DataType::kFloat32 ? appendHead<float>(p, batch, kvHead)
                               : appendHead<Half>(p, batch, kvHead);
}

// --- products -----------------------------------------------------------------------------------

// logits[r][k] = query[r] · key[k] for kRows rows: each loaded piece of a key meets all of them.
template <int kRows, typename T>
void dotRows(const float* query, int64_t dim, const T* key, int64_t keyStride, int64_t count,
             float* logits, int64_t stride) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    const T* base = key + k * keyStride;
    Vec sum[kRows][4] = {};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // key after key, as they lie in memory
      for (int64_t d = 0; d < dim; d += kWidth) {
        const Vec part = load(base + i * keyStride + d);
        for (int r = 0; r < kRows; ++r) sum[r][i] += load(query + r * dim + d) * part;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec4 four = sumsOf(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
      std::memcpy(logits + r * stride + k, &four, sizeof four);
    }
  }
  for (; k < count; ++k) {
    for (int r = 0; r < kRows; ++r) {
      Vec sum = {};
      for (int64_t d = 0; d < dim; d += kWidth) {
        sum += load(query + r * dim + d) * load(key + k * keyStride + d);
      }
      logits[r * stride + k] = sumOf(sum);
    }
  }
}

// Calls function(n, first row) for groups of n = 4, 3, 2 or 1 rows; n is a constant.
template <typename Function>
void forRowGroups(int64_t rows, Function function) {
  int64_t r = 0;
  const auto next = [&](auto size) {
    for (; r + size <= rows; r += size) function(size, r);
  };
  next(std::integral_constant<int, 4>{});
  next(std::integral_constant<int, 3>{});
  next(std::integral_constant<int, 2>{});
  next(std::integral_constant<int, 1>{});
}

// The same for any few rows. Keys come from memory once: a few of them meet all groups of rows
// while they are in the first-level cache.
template <typename T>
void dots(const float* query, int64_t rows, int64_t dim, const T* key, int64_t keyStride,
          int64_t count, float* logits, int64_t stride) {
  for (int64_t k = 0; k < count; k += kNearKeys) {
    const int64_t some = std::min(kNearKeys, count - k);
    forRowGroups(rows, [&](auto size, int64_t r) {
      dotRows<size>(query + r * dim, dim, key + k * keyStride, keyStride, some,
                    logits + r * stride + k, stride);
    });
  }
}

// out[r] += Σ_k weights[r][k] · value[k], kKeys keys at a time: their weights stay in registers,
// the sums do not.
template <int kRows, int kKeys, typename T>
void addValues(const float* weights, int64_t stride, const T* value, int64_t dim, int64_t count,
               float* out) {
  for (int64_t k = 0; k < count; k += kKeys) {
    Vec weight[kRows][kKeys];
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kKeys; ++i) weight[r][i] = splat(weights[r * stride + k + i]);
    }
    for (int64_t d = 0; d < dim; d += kWidth) {
      Vec part[kKeys];
      for (int i = 0; i < kKeys; ++i) part[i] = load(value + (k + i) * dim + d);
      for (int r = 0; r < kRows; ++r) {
        Vec sum = load(out + r * dim + d);
        for (int i = 0; i < kKeys; ++i) sum += weight[r][i] * part[i];
        store(out + r * dim + d, sum);
      }
    }
  }
}

// The values of a tile for a few rows, in the order memory holds them. Memory streams best row
// after row; short rows may be read in pairs, which halves the traffic of the sums.
template <typename T>
void weighValues(const float* weights, int64_t stride, int64_t rows, const T* value, int64_t dim,
                 int64_t count, float* out) {
  const bool inPairs = dim * static_cast<int64_t>(sizeof(T)) <= kPairBytes;
  for (int64_t k = 0; k < count; k += kNearKeys) {
    const int64_t some = std::min(kNearKeys, count - k), paired = inPairs ? some / 2 * 2 : 0;
    forRowGroups(rows, [&](auto size, int64_t r) {
      const float* own = weights + r * stride + k;
      const T* from = value + k * dim;
      addValues<size, 2>(own, stride, from, dim, paired, out + r * dim);
      addValues<size, 1>(own + paired, stride, from + paired * dim, dim, some - paired,
                         out + r * dim);
    });
  }
}

// out[r][n] (+)= Σ_k a[r][k] · b[k][n] for kRows × kColumns vectors kept in registers. Never
// inlined: the registers are its own.
template <int kRows, int kColumns, bool kAccumulate, typename T>
__attribute__((noinline)) void productBlock(const float* a, int64_t aStride, const T* b, int64_t bStride, int64_t depth,
                  float* out, int64_t outStride) {
  Vec sum[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      sum[r][c] = kAccumulate ? load(out + r * outStride + c * kWidth) : Vec{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kColumns];
    for (int c = 0; c < kColumns; ++c) row[c] = load(b + k * bStride + c * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const Vec factor = splat(a[r * aStride + k]);
      for (int c = 0; c < kColumns; ++c) sum[r][c] += factor * row[c];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) store(out + r * outStride + c * kWidth, sum[r][c]);
  }
}

template <int kColumns, bool kAccumulate, typename T>
void productColumns(const float* a, int64_t aStride, int64_t rows, const T* b, int64_t bStride,
                    int64_t depth, float* out, int64_t outStride) {
  int64_t r = 0;
  const auto next = [&](auto size, auto function) {
    for (; r + size <= rows; r += size) {
      function(a + r * aStride, aStride, b, bStride, depth, out + r * outStride, outStride);
    }
  };
  if constexpr (kColumns <= 4) {
    next(6, productBlock<6, kColumns, kAccumulate, T>);
    next(4, productBlock<4, kColumns, kAccumulate, T>);
  }
  next(3, productBlock<3, kColumns, kAccumulate, T>);
  next(2, productBlock<2, kColumns, kAccumulate, T>);
  next(1, productBlock<1, kColumns, kAccumulate, T>);
}

// The same for any width that is a multiple of the vector's.
template <bool kAccumulate, typename T>
void product(const float* a, int64_t aStride, int64_t rows, const T* b, int64_t bStride,
             int64_t depth, float* out, int64_t outStride, int64_t width) {
  int64_t n = 0;
  const auto next = [&](auto columns, auto function) {
    for (; n + columns * kWidth <= width; n += columns * kWidth) {
      function(a, aStride, rows, b + n, bStride, depth, out + n, outStride);
    }
  };
  if constexpr (kWidth == 16) {  // 6 × 4 sums in 32 registers, 6 × 2 in 16
    if (rows <= kFewRows) next(8, productColumns<8, kAccumulate, T>);
    next(4, productColumns<4, kAccumulate, T>);
    next(3, productColumns<3, kAccumulate, T>);
  }
  next(2, productColumns<2, kAccumulate, T>);
  next(1, productColumns<1, kAccumulate, T>);
}

// --- tiles --------------------------------------------------------------------------------------

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
#if defined(__x86_64__)
      _MM_TRANSPOSE4_PS(a, b, c, e);
#else
      const Vec4 a0 = a, b0 = b, c0 = c, e0 = e;
      a = Vec4{a0[0], b0[0], c0[0], e0[0]};
      b = Vec4{a0[1], b0[1], c0[1], e0[1]};
      c = Vec4{a0[2], b0[2], c0[2], e0[2]};
      e = Vec4{a0[3], b0[3], c0[3], e0[3]};
#endif
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

// Scratch memory of one item, cut into its arrays.
struct Scratch {
  float* localQuery;  // (rows, padded D), rotated at their positions, scaled
  float* sinkQuery;   // (rows, padded D), rotated at the distance limit, scaled
  float* logits;      // (rows, tile)
  float* keys;        // (tile, padded D), where keys must be widened
  float* keysT;       // (padded D, tile), for many rows
  float* values;      // (tile, padded D)
  float* ringKeys;    // (int8's tile, D), what a ring of int8 stands for
  float* ringValues;  // (int8's tile, D)
  float* output;      // (rows, padded D), not yet divided by the sum
  float* top;         // (rows) running maximum
  float* sum;         // (rows) running sum
};

inline int64_t tileOf(int64_t rows) { return rows < kManyRows ? kLongTile : kShortTile; }

inline size_t layOut(const Params& p, int64_t numSteps, float* memory, Scratch* s) {
  const int64_t rows = numSteps * group(p), dim = paddedDim(p), tile = tileOf(rows);
  size_t used = 0;
  const auto take = [&](int64_t count) {
    float* start = memory == nullptr ? nullptr : memory + used;
    used += roundUp(count, 16);
    return start;
  };
  Scratch local;
  Scratch& out = s == nullptr ? local : *s;
  out.localQuery = take(rows * dim);
  out.sinkQuery = take(rows * dim);
  out.logits = take(rows * tile);
  out.keys = take(tile * dim);
  out.keysT = take(tile * dim);
  out.values = take(tile * dim);
  out.ringKeys = take(p.int8Cache ? kInt8Tile * p.headDim : 0);
  out.ringValues = take(p.int8Cache ? kInt8Tile * p.headDim : 0);
  out.output = take(rows * dim);
  out.top = take(rows);
  out.sum = take(rows);
  return used;
}

size_t scratchFloats(const Params& p, int64_t numSteps) {
  return layOut(p, numSteps, nullptr, nullptr);
}

size_t partialFloats(const Params& p, int64_t numSteps) {
  return static_cast<size_t>(roundUp(numSteps * group(p) * (paddedDim(p) + 2), 16));
}

// --- one item -----------------------------------------------------------------------------------

// Some keys of one tile: stored one after another, all of the ring or all sinks.
template <typename T>
struct Tile {
  const T* key;
  const T* value;
  int64_t count;
  int64_t position;  // of the first key
  bool sink;
};

template <typename T>
class Block {
 public:
  Block(const Params& p, const Item& item, float* memory)
      : p_(p), item_(item), dim_(paddedDim(p)), group_(group(p)), rows_(item.numSteps * group_),
        tile_(tileOf(rows_)) {
    layOut(p, item.numSteps, memory, &s_);
  }

  void run() {
    gatherQueries();
    if (item_.first) sinks();
    ring();
    item_.partial == nullptr ? writeOutput() : writePartial();
  }

 private:
  // Row r is query step r / group of head r % group: rows of a step share a position.
  int64_t position(int64_t row) const {
    return p_.pastLength[item_.batch] + item_.firstStep + row / group_;
  }
  int64_t head(int64_t row) const { return item_.kvHead * group_ + row % group_; }
  int64_t queryOffset(int64_t row) const {
    const int64_t step = item_.firstStep + row / group_;
    return ((item_.batch * p_.numHeads + head(row)) * p_.sequenceLength + step) * p_.headDim;
  }

  void gatherQueries() {
    const T* query = static_cast<const T*>(p_.query);
    const int64_t half = p_.rotaryDim / 2;
    const bool sinksSeen = item_.first && numSeenSinks(rows_ - 1) > 0;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t step = item_.firstStep + r / group_;
      const int64_t row = (item_.batch * p_.sequenceLength + step) * half;
      const T* x = query + queryOffset(r);
      padded(x, p_.cos + row, p_.sin + row, s_.localQuery + r * dim_);
      if (sinksSeen) padded(x, p_.limitCos, p_.limitSin, s_.sinkQuery + r * dim_);
      const float learned = item_.first ? p_.sinkLogits[head(r)] : kHidden;
      s_.top[r] = std::max(learned, kHidden);
      s_.sum[r] = learned > kHidden ? 1.0f : 0.0f;
      std::fill_n(s_.output + r * dim_, dim_, 0.0f);
    }
  }

  void padded(const T* x, const float* cos, const float* sin, float* out) {
    rotate(p_, x, cos, sin, p_.scale, out);
    std::fill(out + p_.headDim, out + dim_, 0.0f);
  }

  // Sinks 0 … n − 1 have left the window of this row's query.
  int64_t numSeenSinks(int64_t row) const {
    const int64_t left = position(row) - p_.windowSize + 1;
    return std::clamp<int64_t>(left, 0, p_.numSinkTokens);
  }

  void sinks() {
    const int64_t seen = numSeenSinks(rows_ - 1);
    const bool ours = p_.presentSinkKey != nullptr;  // else nobody stores them: no sink tokens
    if (seen == 0 || !ours) return;
    const int64_t base = (item_.batch * p_.numKvHeads + item_.kvHead) * p_.sinkSlots() * p_.headDim;
    const T* key = static_cast<const T*>(p_.presentSinkKey) + base;
    const T* value = static_cast<const T*>(p_.presentSinkValue) + base;
    for (int64_t start = 0; start < seen; start += tile_) {
      const int64_t offset = start * p_.headDim;
      take(Tile<T>{key + offset, value + offset, std::min(tile_, seen - start), start, true});
    }
  }

  // Positions become slots; a tile ends at the latest where the ring does.
  void ring() {
    const int64_t base = (item_.batch * p_.numKvHeads + item_.kvHead) * p_.capacity;
    const bool few = rows_ < kManyRows && p_.headDim == dim_;
    const int64_t most = p_.int8Cache && !few ? std::min(tile_, kInt8Tile) : tile_;
    for (int64_t position = item_.firstKey; position < item_.endKey;) {
      const int64_t slot = position % p_.capacity;
      const int64_t count = std::min({most, item_.endKey - position, p_.capacity - slot});
      if (p_.int8Cache) {
        few ? takeInt8(base + slot, count, position) : takeWidened(base + slot, count, position);
      } else {
        const int64_t offset = (base + slot) * p_.headDim;
        take(Tile<T>{static_cast<const T*>(p_.presentKey) + offset,
                     static_cast<const T*>(p_.presentValue) + offset, count, position, false});
      }
      position += count;
    }
  }

  // A few rows meet the integers themselves: a key's scale multiplies its logit, a value's its
  // weight.
  void takeInt8(int64_t slot, int64_t count, int64_t position) {
    const int64_t offset = slot * p_.headDim;
    const Tile<int8_t> tile = {static_cast<const int8_t*>(p_.presentKey) + offset,
                               static_cast<const int8_t*>(p_.presentValue) + offset, count,
                               position, false};
    dots(s_.localQuery, rows_, dim_, tile.key, dim_, count, s_.logits, tile_);
    scaleLogits(p_.presentKeyScale + slot, count);
    for (int64_t r = 0; r < rows_; ++r) weigh(tile, r);
    scaleLogits(p_.presentValueScale + slot, count);
    values(tile.value, count);
  }

  void scaleLogits(const float* scales, int64_t count) {
    for (int64_t r = 0; r < rows_; ++r) {
      float* logits = s_.logits + r * tile_;
      for (int64_t k = 0; k < count; ++k) logits[k] *= scales[k];
    }
  }

  // Many rows, or rows no vector divides, meet floats.
  void takeWidened(int64_t slot, int64_t count, int64_t position) {
    const int64_t offset = slot * p_.headDim;
    dequantize(static_cast<const int8_t*>(p_.presentKey) + offset, p_.presentKeyScale + slot, count,
               p_.headDim, s_.ringKeys);
    dequantize(static_cast<const int8_t*>(p_.presentValue) + offset, p_.presentValueScale + slot,
               count, p_.headDim, s_.ringValues);
    take(Tile<float>{s_.ringKeys, s_.ringValues, count, position, false});
  }

  template <typename K>  // T, or float for a ring of int8
  void take(const Tile<K>& tile) {
    const float* query = tile.sink ? s_.sinkQuery : s_.localQuery;
    const bool exact = p_.headDim == dim_, many = rows_ >= kManyRows;
    if (many) {
      const float* keys = widened(tile.key, tile.count, s_.keys);
      transpose(keys, dim_, dim_, tile.count, s_.keysT);
      product<false>(query, dim_, rows_, s_.keysT, tile_, dim_, s_.logits, tile_,
                     roundUp(tile.count, kWidth));
    } else if (exact) {
      dots(query, rows_, dim_, tile.key, dim_, tile.count, s_.logits, tile_);
    } else {
      dots(query, rows_, dim_, widened(tile.key, tile.count, s_.keys), dim_, tile.count,
           s_.logits, tile_);
    }
    for (int64_t r = 0; r < rows_; ++r) weigh(tile, r);
    if (exact && !many) {
      values(tile.value, tile.count);
    } else {
      values(widened(tile.value, tile.count, s_.values), tile.count);
    }
  }

  template <typename V>
  void values(const V* value, int64_t count) {
    if (rows_ < kManyRows && kFewRegisters) {
      weighValues(s_.logits, tile_, rows_, value, dim_, count, s_.output);
    } else {
      product<true>(s_.logits, tile_, rows_, value, dim_, count, s_.output, dim_, dim_);
    }
  }

  const float* widened(const float* source, int64_t count, float* buffer) {
    if (p_.headDim == dim_) return source;
    widen(source, p_.headDim, count, dim_, buffer);
    return buffer;
  }
  const float* widened(const Half* source, int64_t count, float* buffer) {
    widen(source, p_.headDim, count, dim_, buffer);
    return buffer;
  }

  // Logits of one row become weights under the running maximum.
  template <typename K>
  void weigh(const Tile<K>& tile, int64_t row) {
    float* logits = s_.logits + row * tile_;
    const int64_t width = roundUp(tile.count, kWidth);
    if (p_.softcap != 0.0f) capLogits(logits, width);
    const float slope = p_.alibiSlopes[head(row)];
    if (slope != 0.0f) addDistances(tile, row, slope, logits, width);
    hide(tile, row, logits, width);
    Vec best = splat(s_.top[row]);
    for (int64_t k = 0; k < width; k += kWidth) best = maximum(best, load(logits + k));
    const float top = maximumOf(best);
    if (top != s_.top[row]) rescale(row, top);
    Vec sum = {};
    for (int64_t k = 0; k < width; k += kWidth) {
      const Vec weight = expNonPositive(load(logits + k) - top);
      store(logits + k, weight);
      sum += weight;
    }
    s_.sum[row] += sumOf(sum);
  }

  void capLogits(float* logits, int64_t width) {
    const float inverse = 1.0f / p_.softcap;
    for (int64_t k = 0; k < width; k += kWidth) {
      store(logits + k, tanhOf(load(logits + k) * inverse) * p_.softcap);
    }
  }

  template <typename K>
  void addDistances(const Tile<K>& tile, int64_t row, float slope, float* logits, int64_t width) {
    const int64_t first = tile.sink ? p_.distanceLimit : position(row) - tile.position;
    for (int64_t k = 0; k < width; ++k) {
      logits[k] -= slope * static_cast<float>(tile.sink ? first : first - k);
    }
  }

  // Keys the row's query does not see: behind it, before its window, beyond the tile.
  template <typename K>
  void hide(const Tile<K>& tile, int64_t row, float* logits, int64_t width) {
    int64_t begin = 0, end = tile.count;
    if (tile.sink) {
      end = std::clamp<int64_t>(numSeenSinks(row) - tile.position, 0, end);
    } else {
      const int64_t own = position(row) - tile.position;
      begin = std::clamp<int64_t>(own - p_.windowSize + 1, 0, tile.count);
      end = std::clamp<int64_t>(own + 1, begin, tile.count);
    }
    for (int64_t k = 0; k < begin; ++k) logits[k] = kHidden;
    for (int64_t k = end; k < width; ++k) logits[k] = kHidden;
  }

  void rescale(int64_t row, float top) {
    const float factor = expNonPositive(splat(s_.top[row] - top))[0];
    s_.top[row] = top;
    s_.sum[row] *= factor;
    float* output = s_.output + row * dim_;
    for (int64_t d = 0; d < dim_; d += kWidth) store(output + d, load(output + d) * factor);
  }

  void writeOutput() {
    T* output = static_cast<T*>(p_.output);
    for (int64_t r = 0; r < rows_; ++r) {
      const float inverse = 1.0f / s_.sum[r];
      T* out = output + queryOffset(r);
      for (int64_t d = 0; d < p_.headDim; ++d) {
        fromFloat(s_.output[r * dim_ + d] * inverse, out + d);
      }
    }
  }

  void writePartial() {
    std::memcpy(item_.partial, s_.output, rows_ * dim_ * sizeof(float));
    std::memcpy(item_.partial + rows_ * dim_, s_.top, rows_ * sizeof(float));
    std::memcpy(item_.partial + rows_ * (dim_ + 1), s_.sum, rows_ * sizeof(float));
  }

  const Params& p_;
  const Item& item_;
  const int64_t dim_, group_, rows_, tile_;
  Scratch s_;
};

void attend(const Params& p, const Item& item, float* scratch) {
  p.dataType == DataType::kFloat32 ? Block<float>(p, item, scratch).run()
                               : Block<Half>(p, item, scratch).run();
}

template <typename T>
void combineRows(const Params& p, const Item* items, size_t count) {
  const Item& item = items[0];
  const int64_t dim = paddedDim(p), rows = item.numSteps * group(p);
  for (int64_t r = 0; r < rows; ++r) {
    float top = kHidden, sum = 0.0f;
    for (size_t i = 0; i < count; ++i) top = std::max(top, items[i].partial[rows * dim + r]);
    float weights[lminf::cpu::kMaxSplits];
    for (size_t i = 0; i < count; ++i) {
      weights[i] = expNonPositive(splat(items[i].partial[rows * dim + r] - top))[0];
      sum += weights[i] * items[i].partial[rows * (dim + 1) + r];
    }
    const int64_t head = item.kvHead * group(p) + r % group(p);
    const int64_t step = item.firstStep + r / group(p);
    T* out = static_cast<T*>(p.output) +
             ((item.batch * p.numHeads + head) * p.sequenceLength + step) * p.headDim;
    for (int64_t d = 0; d < p.headDim; ++d) {
      float value = 0.0f;
      for (size_t i = 0; i < count; ++i) value += weights[i] * items[i].partial[r * dim + d];
      fromFloat(value / sum, out + d);
    }
  }
}

void combine(const Params& p, const Item* items, size_t count) {
  p.dataType == DataType::kFloat32 ? combineRows<float>(p, items, count)
                               : combineRows<Half>(p, items, count);
}

}  // namespace
