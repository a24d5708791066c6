// What every kernel gets: the tensors of the call, sizes narrowed to int, and the plan's parts.
#pragma once

#include <cstdint>

#include "../operator/contract.h"
#include "divisor.h"

namespace lminf {

struct KernelArguments : Tensors {
  float* partialOutput;  // (splits, B, H, S, D)
  float* partialStats;   // (splits, B, H, S, 2): maximum in units of log2, total
  // (B, G) counters of blocks that have ended, zero between launches, where the last block of
  // decode combines; else null.
  std::uint32_t* arrivals;

  std::int64_t windowSize;
  int batchSize;
  Divisor numKvHeads;
  int group;  // query heads per key/value head
  Divisor sequenceLength;
  Divisor capacity;
  int numSinkTokens;
  int sinkSlots;    // max(N, 1)
  int sinkBatch;    // rows of the past sinks: B or 1
  int windowLimit;  // W, or a value no step of a ring reaches
  int rotaryDim;
  bool rotaryInterleaved;
  bool copySinkKey;  // present sinks are another tensor than their past
  bool copySinkValue;
  bool writeSinks;
  bool startsEarly;      // this GPU lets a kernel start before the one ahead of it has ended
  bool appendsInDecode;  // the decode kernel appends, there is no append kernel
  float scale;
  float softcap;
  float limitDistance;  // L
  Divisor rowBlocks;
  Divisor splits;
};

}  // namespace lminf
