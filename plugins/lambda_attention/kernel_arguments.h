// What every kernel gets: the params of the call with sizes narrowed to int, plus the plan's parts.
#pragma once

#include <cstdint>

namespace lminf {

struct KernelArguments {
  const void* query;
  const void* key;
  const void* value;
  const void* pastSinkKey;
  const void* pastSinkValue;
  const std::int64_t* pastLength;
  const std::int64_t* newLength;
  const float* cos;
  const float* sin;
  const float* limitCos;
  const float* limitSin;
  const float* alibiSlopes;
  const float* sinkLogits;
  void* output;
  void* presentKey;
  void* presentValue;
  void* presentSinkKey;
  void* presentSinkValue;
  float* partialOutput;  // (splits, B, H, S, D)
  float* partialStats;   // (splits, B, H, S, 2): maximum in units of log2, total

  std::int64_t windowSize;
  int batchSize;
  int numKvHeads;
  int group;  // query heads per key/value head
  int sequenceLength;
  int capacity;
  int numSinkTokens;
  int sinkSlots;    // max(N, 1)
  int sinkBatch;    // rows of the past sinks: B or 1
  int windowLimit;  // W, or a value no step of a ring reaches
  int rotaryDim;
  bool rotaryInterleaved;
  bool copySinkKey;  // present sinks are another tensor than their past
  bool copySinkValue;
  bool writeSinks;
  float scale;
  float softcap;
  float limitDistance;  // L
  int rowBlocks;
  int splits;
};

}  // namespace lminf
