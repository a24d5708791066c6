// The arithmetic of one piece of attention. Compiled once per instruction set.
//
// Flash attention: keys pass in tiles, each row of logits lives only inside its tile, a running
// maximum and sum carry the softmax. All query heads of a key/value head share each tile.
#pragma once

#include <algorithm>
#include <cstring>

#include "append.h"
#include "combine.h"
#include "few_rows.h"
#include "matrix_product.h"
#include "scratch.h"

namespace {

constexpr bool kFewRegisters = kWidth < 16;  // 16 of them: a row's sums must not stay in them

template <typename T>
class Block {
 public:
  Block(const Params& p, const Item& item, float* memory)
      : p_(p), item_(item), dim_(paddedDim(p)), group_(group(p)), rows_(item.numSteps * group_),
        tile_(tileOf(rows_)), bias_(p, s_.bias, rows_) {
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
    const bool ours = p_.presentSinkKey != nullptr;  // null: there are no sink tokens
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
    if (p_.hasKeyBias) {
      bias_.template read<T>(item_.kvHead);
      if (few) bias_.readQueries(s_.localQuery, dim_);
    }
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
    if (p_.hasKeyBias) bias_.addProducts(position, count, s_.logits, tile_);
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
    if (p_.hasKeyBias) bias_.addTo(s_.ringKeys, position, count);
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
      dots(query, rows_, dim_, widened(tile.key, tile.count, s_.keys), dim_, tile.count, s_.logits,
           tile_);
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
  Scratch s_{};
  KeyBias bias_;
};

void attend(const Params& p, const Item& item, float* scratch) {
  p.dataType == DataType::kFloat32 ? Block<float>(p, item, scratch).run()
                                   : Block<Half>(p, item, scratch).run();
}

}  // namespace
