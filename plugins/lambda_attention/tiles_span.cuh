// What the rows of a block of tiles can see.
#pragma once

#include "row.cuh"

namespace lminf {

// What a block's rows can see: the steps of its rows are contiguous if they belong to one head.
template <int kRows>
__device__ __forceinline__ KeySpan spanOfBlock(const KernelArguments& a, const RowGroup& group,
                                               std::int64_t past, int real) {
  const int lastRow = smaller(group.firstRow + kRows, group.rows) - 1;
  const bool oneHead = group.firstRow / a.sequenceLength == lastRow / a.sequenceLength;
  const int firstStep = oneHead ? group.firstRow % a.sequenceLength : 0;
  const int lastStep = oneHead ? lastRow % a.sequenceLength : a.sequenceLength - 1;
  return keySpan(past, real, firstStep, lastStep, a.windowSize, a.numSinkTokens, a.capacity);
}

}  // namespace lminf
