// attend, simply: one warp per query row, one key at a time. For float32, which tests use.
#pragma once

#include "ring.cuh"
#include "tile_shapes.h"

namespace lminf {

template <class T, class Ring, int D>
__global__ void __launch_bounds__(kSimpleWarps * 32, 4) simpleKernel(const KernelArguments a) {
  constexpr int kParts = (D + 31) / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kSimpleWarps + threadIdx.x / 32;
  const int numHeads = a.numKvHeads * a.group;
  if (row >= static_cast<std::int64_t>(a.batchSize) * numHeads * a.sequenceLength) return;
  const int step = static_cast<int>(row % a.sequenceLength.value);
  const std::int64_t batchHead = row / a.sequenceLength.value;
  const int head = static_cast<int>(batchHead % numHeads);
  const int batch = static_cast<int>(batchHead / numHeads);
  const std::int64_t pair = static_cast<std::int64_t>(batch) * a.numKvHeads + head / a.group;

  const int real = realTokens(a.newLength[batch], a.sequenceLength);
  const KeySpan span =
      keySpan(a.pastLength[batch], real, step, step, a.windowSize, a.numSinkTokens, a.capacity);
  const T* query = static_cast<const T*>(a.query) + row * D;
  const float* cos = a.cos + cosRow(a, batch, step);
  const float* sin = a.sin + cosRow(a, batch, step);
  float sinkQuery[kParts], ringQuery[kParts], sum[kParts];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int dim = part * 32 + lane;
    sum[part] = 0.0f;
    sinkQuery[part] = ringQuery[part] = 0.0f;
    if (dim >= D) continue;
    sinkQuery[part] =
        rotatedElement(query, dim, a.limitCos, a.limitSin, a.rotaryDim, a.rotaryInterleaved);
    ringQuery[part] = rotatedElement(query, dim, cos, sin, a.rotaryDim, a.rotaryInterleaved);
  }

  const float slope = slopeOf(a, head);
  float maximum = -INFINITY, total = 0.0f;
  for (int number = 0; number < span.sinkCount + span.ringCount; ++number) {
    const bool isSink = number < span.sinkCount;
    const int ring = number - span.sinkCount;
    const std::int64_t at = isSink ? pair * a.sinkSlots + number
                                   : pair * a.capacity + ringSlot(span.firstSlot, ring, a.capacity);
    const auto element = [&](const void* sinks, const void* rings, int dim) {
      return isSink ? toFloat(static_cast<const T*>(sinks)[at * D + dim])
                    : ringElement<Ring>(rings, at * D + dim);
    };
    float keyScale = 1.0f, valueScale = 1.0f;
    if (isRounded<T, Ring>() && !isSink) {
      keyScale = a.presentKeyScale[at];
      valueScale = a.presentValueScale[at];
    }
    float product = 0.0f;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int dim = part * 32 + lane;
      const float turned = isSink ? sinkQuery[part] : ringQuery[part];
      if (dim < D) product += turned * element(a.presentSinkKey, a.presentKey, dim);
    }
    product = sumOver(product, 1, 16) * keyScale;
    const float distance =
        isSink ? a.limitDistance : static_cast<float>(step - span.firstRelative - ring);
    float logit = product * a.scale;
    if (a.softcap > 0.0f) logit = a.softcap * tanhf(logit / a.softcap);
    logit -= slope * distance;
    const float top = fmaxf(maximum, logit);
    const float carried = expf(maximum - top), weight = expf(logit - top);
    maximum = top;
    total = total * carried + weight;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int dim = part * 32 + lane;
      if (dim >= D) continue;
      const float taken = element(a.presentSinkValue, a.presentValue, dim);
      sum[part] = sum[part] * carried + weight * valueScale * taken;
    }
  }
  const float factor = softmaxFactor(a, head, maximum * kLog2E, total);
  T* output = static_cast<T*>(a.output) + row * D;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int dim = part * 32 + lane;
    if (dim < D) output[dim] = fromFloat<T>(sum[part] * factor);
  }
}

}  // namespace lminf
