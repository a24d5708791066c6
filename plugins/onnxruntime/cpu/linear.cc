// How a product with a weight is cut into pieces that can run at once.
#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "parallel.h"

namespace lminf::cpu {
namespace {

// Up to here every weight row is streamed past the tokens; beyond, panels of rows are packed.
constexpr int64_t kFewTokens = 8;
// Bytes of weights worth a thread's while.
constexpr int64_t kStreamBytes = int64_t{128} << 10;
// Tokens of a piece: enough to pay for packing a panel, few enough for the cache.
constexpr int64_t kBlockTokens = 512;

thread_local Arena wideArena;
thread_local Arena panelArena;

int64_t ceilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

void fewTokens(const Linear& p, const LinearKernels& kernels, const Parallel& parallel) {
  const int64_t rowBytes = std::max<int64_t>(p.inFeatures, 1) * (p.element == Element::kFloat ? 4 : 2);
  // A multiple of four rows: they are summed four at a time.
  const int64_t rows = ceilDivide(ceilDivide(kStreamBytes, rowBytes), 4) * 4;
  forEach(parallel, ceilDivide(p.outFeatures, rows), [&](size_t i) {
    const int64_t first = static_cast<int64_t>(i) * rows;
    kernels.few(p, first, std::min(first + rows, p.outFeatures));
  });
}

bool manyTokens(const Linear& p, const LinearKernels& kernels, const Parallel& parallel) {
  const int64_t blocks = ceilDivide(p.tokens, kBlockTokens);
  const int64_t tokens = ceilDivide(p.tokens, blocks);
  const int64_t panels = ceilDivide(p.outFeatures, kernels.panelRows);
  std::atomic<bool> enough{true};
  forEach(parallel, blocks * panels, [&](size_t i) {
    const int64_t item = static_cast<int64_t>(i);
    const int64_t first = item / panels * tokens, end = std::min(first + tokens, p.tokens);
    float* scratch = panelArena.take(kernels.scratchFloats(end - first));
    if (scratch == nullptr) {
      enough = false;
    } else if (first < end) {
      kernels.many(p, first, end, item % panels * kernels.panelRows, scratch);
    }
  });
  return enough;
}

}  // namespace

const LinearKernels& activeLinear() {
#if defined(__x86_64__)
  for (const LinearKernels* kernels : {&kLinearAvx512, &kLinearAvx2}) {
    if (std::strcmp(kernels->name, activeKernels().name) == 0) return *kernels;
  }
#endif
  return kLinearPortable;
}

const char* linear(Linear p, const void* x, const LinearKernels& kernels,
                   const Parallel& parallel) {
  if (p.tokens == 0 || p.outFeatures == 0) return nullptr;
  p.x = static_cast<const float*>(x);
  if (p.element == Element::kHalf) {
    float* wide = wideArena.take(std::max<int64_t>(p.tokens * p.inFeatures, 1));
    if (wide == nullptr) return "no memory for the activations in float32";
    kernels.widen(x, p.tokens * p.inFeatures, wide);
    p.x = wide;
  }
  if (p.tokens <= kFewTokens) {
    fewTokens(p, kernels, parallel);
    return nullptr;
  }
  return manyTokens(p, kernels, parallel) ? nullptr : "no memory for a panel of weights";
}

}  // namespace lminf::cpu
