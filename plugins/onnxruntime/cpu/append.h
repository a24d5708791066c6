// Writing new keys, values and sinks. Compiled once per instruction set.
#pragma once

#include <cstring>

#include "int8_rings.h"
#include "rotate.h"

namespace {

using lminf::DataType;

template <typename T>
void appendHead(const Params& p, int64_t batch, int64_t kvHead) {
  const int64_t pair = batch * p.numKvHeads + kvHead, dim = p.headDim, half = p.rotaryDim / 2;
  const T* key = static_cast<const T*>(p.key) + pair * p.sequenceLength * dim;
  const T* value = static_cast<const T*>(p.value) + pair * p.sequenceLength * dim;
  T* sinkKey = static_cast<T*>(p.presentSinkKey);
  T* sinkValue = static_cast<T*>(p.presentSinkValue);
  const T* bias = p.hasKeyBias ? static_cast<const T*>(p.keyBias) + kvHead * dim : nullptr;
  const int64_t past = p.pastLength[batch];
  for (int64_t step = 0; step < p.newLength[batch]; ++step) {
    const int64_t position = past + step, slot = pair * p.capacity + position % p.capacity;
    const int64_t row = (batch * p.sequenceLength + step) * half;
    const T *newKey = key + step * dim, *newValue = value + step * dim;
    if (p.int8Cache) {
      int8_t* ringKey = static_cast<int8_t*>(p.presentKey) + slot * dim;
      int8_t* ringValue = static_cast<int8_t*>(p.presentValue) + slot * dim;
      p.presentKeyScale[slot] = quantizeRotated(p, newKey, bias, p.cos + row, p.sin + row, ringKey);
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

}  // namespace
