// Rounds the activations, and chooses how they meet the weight.
#include "int8_linear.h"

#include <algorithm>
#include <cstring>

#include "attention.h"

namespace lminf::cpu {
namespace {

// Tokens worth a thread's while.
constexpr int64_t kRoundTokens = 16;

thread_local Arena int8Arena;

// Calls round(token) for every token.
template <typename Round>
void forTokens(const Linear& p, const Parallel& parallel, Round round) {
  forEach(parallel, ceilDivide(p.tokens, kRoundTokens), [&](size_t i) {
    const int64_t first = static_cast<int64_t>(i) * kRoundTokens;
    const int64_t end = std::min(first + kRoundTokens, p.tokens);
    for (int64_t token = first; token < end; ++token) round(token);
  });
}

const char* asIntegers(Linear p, const Int8LinearKernels& kernels, const Parallel& parallel) {
  const size_t bytes = kernels.tokenBytes(*p.blocks);
  // One row more for each piece to round into.
  const int64_t pieces = ceilDivide(p.tokens, kRoundTokens);
  float* memory = int8Arena.take((p.tokens + pieces) * bytes / sizeof(float));
  if (memory == nullptr) return "no memory for the activations as integers";
  uint8_t* rounded = reinterpret_cast<uint8_t*>(memory);
  forTokens(p, parallel, [&](int64_t token) {
    uint8_t* spare = rounded + (p.tokens + token / kRoundTokens) * bytes;
    kernels.round(*p.blocks, p.x + token * p.inFeatures, p.inFeatures, rounded + token * bytes,
                  reinterpret_cast<int8_t*>(spare));
  });
  p.int8Tokens = rounded;
  return multiply(p, kernels.product, parallel);
}

const char* asFloats(Linear p, const LinearKernels& floats, const Int8LinearKernels& kernels,
                     const Parallel& parallel) {
  float* rounded = int8Arena.take(std::max<int64_t>(p.tokens * p.inFeatures, 1));
  if (rounded == nullptr) return "no memory for the rounded activations";
  forTokens(p, parallel, [&](int64_t token) {
    kernels.roundFloats(*p.blocks, p.x + token * p.inFeatures, p.inFeatures,
                        rounded + token * p.inFeatures);
  });
  p.x = rounded;
  return multiply(p, floats.product, parallel);
}

}  // namespace

const Int8LinearKernels& activeInt8Linear() {
#if defined(__x86_64__)
  for (const Int8LinearKernels* kernels :
       {&kInt8LinearAvx512Vnni, &kInt8LinearAvx512, &kInt8LinearAvx2}) {
    if (std::strcmp(kernels->name, activeKernels().name) == 0) return *kernels;
  }
#endif
  return kInt8LinearPortable;
}

const char* int8Linear(Linear p, const void* x, const LinearKernels& floats,
                       const Int8LinearKernels& kernels, const Parallel& parallel) {
  if (p.tokens == 0 || p.outFeatures == 0) return nullptr;
  if (const char* wrong = widenInput(&p, x, floats)) return wrong;
  const bool integers = p.tokens <= kFewTokens || kernels.product.many != nullptr;
  return integers ? asIntegers(p, kernels, parallel) : asFloats(p, floats, kernels, parallel);
}

}  // namespace lminf::cpu
