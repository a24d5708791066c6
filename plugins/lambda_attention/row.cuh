// What the kernels share: a rotated element, logits, the last step of a softmax.
#pragma once

#include "device.cuh"
#include "kernel_arguments.h"

namespace lminf {

// One element of a row and what it takes to rotate it. Loading uses nothing that it loads, so the
// loads of several elements travel together if all are loaded before the first is rotated.
template <class T>
struct RotaryElement {
  T element{}, partner{};
  // As they stand here, an element passes unchanged, even a negative zero.
  float cos = 1.0f, sin = -0.0f, sign = 1.0f;

  // Element `dim` of a row, with table rows cos and sin of R/2 entries.
  __device__ __forceinline__ void load(const T* row, int dim, const float* cosRow,
                                       const float* sinRow, int rotaryDim, bool interleaved) {
    element = row[dim];
    if (dim >= rotaryDim) return;
    const RotaryPair pair = rotaryPair(dim, rotaryDim, interleaved);
    partner = row[pair.partner];
    cos = cosRow[pair.pair];
    sin = sinRow[pair.pair];
    sign = pair.sign;
  }

  __device__ __forceinline__ float rotated() const {
    return toFloat(element) * cos + sign * toFloat(partner) * sin;
  }
};

template <class T>
__device__ __forceinline__ float rotatedElement(const T* row, int dim, const float* cos,
                                                const float* sin, int rotaryDim, bool interleaved) {
  RotaryElement<T> element;
  element.load(row, dim, cos, sin, rotaryDim, interleaved);
  return element.rotated();
}

__device__ __forceinline__ std::int64_t cosRow(const KernelArguments& a, int batch, int step) {
  return (static_cast<std::int64_t>(batch) * a.sequenceLength + step) * (a.rotaryDim / 2);
}

// tanh by one exponential: its error is a few 1e-7 of the cap, small beside a 16-bit logit.
__device__ __forceinline__ float softCapped(float logit, float cap) {
  const float power = exp2Fast(logit * (2.0f * kLog2E / cap));
  return cap * (1.0f - divideFast(2.0f, power + 1.0f));
}

// A logit in units of log2, from a product of query and key.
__device__ __forceinline__ float scaledLogit(float product, const KernelArguments& a, float slope,
                                             float distance) {
  float logit = product * a.scale;
  if (a.softcap > 0.0f) logit = softCapped(logit, a.softcap);
  return (logit - slope * distance) * kLog2E;
}

__device__ __forceinline__ float slopeOf(const KernelArguments& a, int head) {
  return a.alibiSlopes == nullptr ? 0.0f : a.alibiSlopes[head];
}

// The factor that turns a sum of values into their mean: a learned logit joins the denominator
// here, once. A row that saw nothing yields 0.
__device__ __forceinline__ float softmaxFactor(const KernelArguments& a, int head, float maximum,
                                               float total) {
  if (!(total > 0.0f)) return 0.0f;
  float scale = 1.0f;
  if (a.sinkLogits != nullptr) {
    const float learned = a.sinkLogits[head] * kLog2E;
    const float top = fmaxf(maximum, learned);
    scale = exp2Fast(maximum - top);
    total = total * scale + exp2Fast(learned - top);
  }
  return scale / total;
}

// Where a block's rows stand: H/G query heads times S steps of one key/value head lie one after
// another in query, output and partial results.
struct RowGroup {
  int batch;
  int kvHead;
  int firstRow;         // of this block, within the group
  int rows;             // of the whole group
  std::int64_t offset;  // of the group's first row, in rows of query

  __device__ __forceinline__ RowGroup(const KernelArguments& a, unsigned block, int rowsPerBlock) {
    const int pair = static_cast<int>(block) / a.rowBlocks;
    batch = pair / a.numKvHeads;
    kvHead = pair % a.numKvHeads;
    firstRow = static_cast<int>(block) % a.rowBlocks * rowsPerBlock;
    rows = a.group * a.sequenceLength;
    offset = static_cast<std::int64_t>(pair) * rows;
  }

  __device__ __forceinline__ int head(const KernelArguments& a, int row) const {
    return kvHead * a.group + row / a.sequenceLength;
  }
};

}  // namespace lminf
