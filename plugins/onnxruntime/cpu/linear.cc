// How a product with a weight is cut into pieces that can run at once.
#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "attention.h"

namespace lminf::cpu {
namespace {

// Bytes of weights of a piece. A thread that is woken comes late by as long as it takes to stream
// some tens of kilobytes: small weights are cut into many pieces, so that it finds some left, and
// large ones into long runs, as memory streams best.
constexpr int64_t kLeastBytes = int64_t{16} << 10, kMostBytes = int64_t{128} << 10;
constexpr int64_t kPieces = 32;

thread_local Arena wideArena;
thread_local Arena panelArena;

int64_t rowBytes(const Linear& p) {
  if (p.blocks != nullptr) return std::max<int64_t>(p.blocks->rowBytes(), 1);
  return std::max<int64_t>(p.inFeatures, 1) * (p.dataType == DataType::kFloat32 ? 4 : 2);
}

bool fewTokens(const Linear& p, const Product& product, const Parallel& parallel) {
  const int64_t bytes = rowBytes(p) * p.outFeatures / kPieces;
  const int64_t piece = std::min(std::max(bytes, kLeastBytes), kMostBytes);
  const int64_t unit = product.fewRows(p);
  const int64_t rows = ceilDivide(ceilDivide(piece, rowBytes(p)), unit) * unit;
  std::atomic<bool> enough{true};
  forEach(parallel, ceilDivide(p.outFeatures, rows), [&](size_t i) {
    const int64_t first = static_cast<int64_t>(i) * rows;
    const size_t floats = product.fewFloats(p);
    float* scratch = floats == 0 ? nullptr : panelArena.take(floats);
    if (floats > 0 && scratch == nullptr) {
      enough = false;
    } else {
      product.few(p, first, std::min(first + rows, p.outFeatures), scratch);
    }
  });
  return enough;
}

bool manyTokens(const Linear& p, const Product& product, const Parallel& parallel) {
  const int64_t blocks = ceilDivide(p.tokens, kPieceTokens);
  const int64_t tokens = ceilDivide(p.tokens, blocks);
  const int64_t panels = ceilDivide(p.outFeatures, product.panelRows(p));
  std::atomic<bool> enough{true};
  forEach(parallel, blocks * panels, [&](size_t i) {
    const int64_t item = static_cast<int64_t>(i);
    const int64_t first = item / panels * tokens, end = std::min(first + tokens, p.tokens);
    float* scratch = panelArena.take(product.manyFloats(p));
    if (scratch == nullptr) {
      enough = false;
    } else if (first < end) {
      product.many(p, first, end, item % panels * product.panelRows(p), scratch);
    }
  });
  return enough;
}

}  // namespace

const LinearKernels& activeLinear() {
#if defined(__x86_64__)
  const char* name = activeKernels().name;
  if (std::strcmp(name, "avx512vnni") == 0) return kLinearAvx512;
  for (const LinearKernels* kernels : {&kLinearAvx512, &kLinearAvx2}) {
    if (std::strcmp(kernels->name, name) == 0) return *kernels;
  }
#endif
  return kLinearPortable;
}

const char* widenInput(Linear* p, const void* x, const LinearKernels& kernels) {
  p->x = static_cast<const float*>(x);
  if (p->dataType == DataType::kFloat32) return nullptr;
  float* wide = wideArena.take(std::max<int64_t>(p->tokens * p->inFeatures, 1));
  if (wide == nullptr) return "no memory for the activations in float32";
  kernels.widen(x, p->tokens * p->inFeatures, wide);
  p->x = wide;
  return nullptr;
}

const char* multiply(const Linear& p, const Product& product, const Parallel& parallel) {
  const bool done =
      p.tokens <= kFewTokens ? fewTokens(p, product, parallel) : manyTokens(p, product, parallel);
  return done ? nullptr : "no memory for a panel of weights";
}

const char* linear(Linear p, const void* x, const LinearKernels& kernels,
                   const Parallel& parallel) {
  if (p.tokens == 0 || p.outFeatures == 0) return nullptr;
  if (const char* wrong = widenInput(&p, x, kernels)) return wrong;
  return multiply(p, kernels.product, parallel);
}

}  // namespace lminf::cpu
