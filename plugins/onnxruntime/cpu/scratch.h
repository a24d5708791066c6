// Scratch memory of one piece of attention, and the layout of its result. Compiled once per
// instruction set.
#pragma once

#include "int8_rings.h"
#include "key_bias.h"
#include "tiles.h"

namespace {

inline int64_t roundUp(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
inline int64_t paddedDim(const Params& p) { return roundUp(p.headDim, kWidth); }
inline int64_t group(const Params& p) { return p.numHeads / p.numKvHeads; }

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
  BiasScratch bias;   // where keys lie in the ring without their bias
};

template <typename Take>
inline void layOutBias(const Params& p, int64_t rows, Take take, BiasScratch* out) {
  const int64_t few = std::min(rows, kManyRows), rotary = p.rotaryDim;
  out->bias = take(p.headDim);
  out->turned = take(p.headDim);
  out->far = take(rotary);
  out->products = take(few * rotary);
  out->aligned = take(few * rotary);
  out->block = take(few * rotary);
  out->constant = take(few);
  out->table = take(rotary * kBiasKeys);
  out->logits = take(few * kBiasKeys);
}

inline size_t layOut(const Params& p, int64_t numSteps, float* memory, Scratch* s) {
  const int64_t rows = numSteps * group(p), dim = paddedDim(p), tile = tileOf(rows);
  size_t used = 0;
  const auto take = [&](int64_t count) {
    float* start = memory == nullptr ? nullptr : memory + used;
    used += roundUp(count, 16);
    return start;
  };
  Scratch local{};
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
  if (p.hasKeyBias) layOutBias(p, rows, take, &out.bias);
  return used;
}

size_t scratchFloats(const Params& p, int64_t numSteps) {
  return layOut(p, numSteps, nullptr, nullptr);
}

size_t partialFloats(const Params& p, int64_t numSteps) {
  return static_cast<size_t>(roundUp(numSteps * group(p) * (paddedDim(p) + 2), 16));
}

}  // namespace
