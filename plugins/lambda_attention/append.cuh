// append: one pass over the new tokens that writes ring and sinks.
#pragma once

#include "ring.cuh"
#include "tile_shapes.h"

namespace lminf {

// A new token goes to ring slot position mod C, its key rotated at that position; padding too,
// which lands on tokens that have left every window (docs/operator.md). A real token at a
// position below N also goes to its sink slot, not rotated.
template <class T, class Ring, int D>
__device__ __forceinline__ void appendToken(const KernelArguments& a, int batch, int kvHead,
                                            int step, int lane) {
  constexpr int kParts = (D + 31) / 32;
  const std::int64_t pair = static_cast<std::int64_t>(batch) * a.numKvHeads + kvHead;
  const std::int64_t source = (pair * a.sequenceLength + step) * D;
  const T* value = static_cast<const T*>(a.value) + source;
  const float* cos = a.cos + cosRow(a, batch, step);
  const float* sin = a.sin + cosRow(a, batch, step);
  // All loads before the first store, since the compiler may not move a load over one.
  RotaryElement<T> keys[kParts];
  T values[kParts]{};
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int dim = part * 32 + lane;
    if (dim >= D) continue;
    keys[part].load(static_cast<const T*>(a.key) + source, dim, cos, sin, a.rotaryDim,
                    a.rotaryInterleaved);
    values[part] = value[dim];
  }

  const std::int64_t position = a.pastLength[batch] + step;
  const std::int64_t slot = pair * a.capacity + floorMod(position, a.capacity);
  const std::int64_t sink = (pair * a.sinkSlots + position) * D;
  const bool isSink = a.writeSinks && position >= 0 && position < a.sinkSlots &&
                      step < realTokens(a.newLength[batch], a.sequenceLength);
  float keyScale = 0.0f, valueScale = 0.0f;
  if constexpr (isRounded<T, Ring>()) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part * 32 + lane >= D) continue;
      keyScale = fmaxf(keyScale, fabsf(keys[part].rotated()));
      valueScale = fmaxf(valueScale, fabsf(toFloat(values[part])));
    }
    keyScale = int8Scale(maximumOver(keyScale, 1, 16));
    valueScale = int8Scale(maximumOver(valueScale, 1, 16));
    if (lane == 0) {
      a.presentKeyScale[slot] = keyScale;
      a.presentValueScale[slot] = valueScale;
    }
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int dim = part * 32 + lane;
    if (dim >= D) continue;
    Ring* ringKey = static_cast<Ring*>(a.presentKey) + slot * D;
    Ring* ringValue = static_cast<Ring*>(a.presentValue) + slot * D;
    if constexpr (isRounded<T, Ring>()) {
      ringKey[dim] = toInt8(keys[part].rotated(), keyScale);
      ringValue[dim] = toInt8(toFloat(values[part]), valueScale);
    } else {
      ringKey[dim] = fromFloat<T>(keys[part].rotated());
      ringValue[dim] = values[part];
    }
    if (isSink) {
      static_cast<T*>(a.presentSinkKey)[sink + dim] = keys[part].element;
      static_cast<T*>(a.presentSinkValue)[sink + dim] = values[part];
    }
  }
}

// Carries a sink slot over from the past, unless a new token fills it.
template <class T, int D>
__device__ __forceinline__ void carrySink(const KernelArguments& a, int batch, int kvHead, int slot,
                                          int lane) {
  const std::int64_t step = slot - a.pastLength[batch];
  if (step >= 0 && step < realTokens(a.newLength[batch], a.sequenceLength)) return;
  const std::int64_t row = static_cast<std::int64_t>(kvHead) * a.sinkSlots + slot;
  const std::int64_t heads = static_cast<std::int64_t>(a.numKvHeads) * a.sinkSlots;
  const std::int64_t from = ((a.sinkBatch == 1 ? 0 : batch) * heads + row) * D;
  const std::int64_t to = (batch * heads + row) * D;
  for (int dim = lane; dim < D; dim += 32) {
    if (a.copySinkKey) {
      static_cast<T*>(a.presentSinkKey)[to + dim] =
          static_cast<const T*>(a.pastSinkKey)[from + dim];
    }
    if (a.copySinkValue) {
      static_cast<T*>(a.presentSinkValue)[to + dim] =
          static_cast<const T*>(a.pastSinkValue)[from + dim];
    }
  }
}

// One warp takes one row of (B, G, S, D), keys and values alike; where present sinks are another
// tensor than their past, further warps take the sink slots.
template <class T, class Ring, int D>
__global__ void __launch_bounds__(kAppendWarps * 32, 4) appendKernel(const KernelArguments a) {
  letNextStart();
  const int carried = a.copySinkKey || a.copySinkValue ? a.sinkSlots : 0;
  const int perPair = a.sequenceLength + carried;
  const std::int64_t warp = static_cast<std::int64_t>(blockIdx.x) * kAppendWarps + threadIdx.x / 32;
  if (warp >= static_cast<std::int64_t>(perPair) * a.batchSize * a.numKvHeads) return;
  const int pair = static_cast<int>(warp / perPair), row = static_cast<int>(warp % perPair);
  const int batch = pair / a.numKvHeads, kvHead = pair % a.numKvHeads;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (row < a.sequenceLength) {
    appendToken<T, Ring, D>(a, batch, kvHead, row, lane);
  } else {
    carrySink<T, D>(a, batch, kvHead, row - a.sequenceLength, lane);
  }
}

}  // namespace lminf
