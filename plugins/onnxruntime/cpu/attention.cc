// How an operator call is cut into pieces that can run at once.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "../../operator/rules.h"

namespace lminf::cpu {
namespace {

// A prefill block has about this many rows: enough for a tile of keys to be worth transposing,
// few enough for its arrays to stay in the second-level cache.
constexpr int64_t kBlockRows = 128;
// With fewer items of a sequence than this their keys are split too, in pieces of at least
// kSplitKeys.
constexpr int64_t kEnoughItems = 16;
constexpr int64_t kSplitKeys = 256;
// Appending this many elements is worth other threads.
constexpr int64_t kLargeAppend = 1 << 15;

thread_local Arena scratchArena;
thread_local Arena partialArena;

size_t elementSize(const Params& p) { return p.dataType == DataType::kFloat32 ? 4 : 2; }

// The old cache, where it is not the new one already. (1, G, 1, D) sinks serve every row.
void carryOver(const Params& p, const Parallel& parallel) {
  const auto copy = [&](const void* past, void* present, size_t slot) {
    if (past == present) return;
    const size_t ring = static_cast<size_t>(p.capacity) * slot;
    forEach(parallel, p.batchSize * p.numKvHeads, [&](size_t pair) {
      std::memcpy(static_cast<char*>(present) + pair * ring,
                  static_cast<const char*>(past) + pair * ring, ring);
    });
  };
  const size_t slot = static_cast<size_t>(p.headDim) * (p.int8Cache ? 1 : elementSize(p));
  copy(p.pastKey, p.presentKey, slot);
  copy(p.pastValue, p.presentValue, slot);
  if (p.int8Cache) {
    copy(p.pastKeyScale, p.presentKeyScale, sizeof(float));
    copy(p.pastValueScale, p.presentValueScale, sizeof(float));
  }
  const size_t sinks =
      static_cast<size_t>(p.numKvHeads * p.sinkSlots() * p.headDim) * elementSize(p);
  const auto copySinks = [&](const void* past, void* present) {
    if (present == nullptr || past == present) return;
    for (int64_t row = 0; row < p.batchSize; ++row) {
      const int64_t source = p.sinkBatchSize == 1 ? 0 : row;
      std::memcpy(static_cast<char*>(present) + row * sinks,
                  static_cast<const char*>(past) + source * sinks, sinks);
    }
  };
  copySinks(p.pastSinkKey, p.presentSinkKey);
  copySinks(p.pastSinkValue, p.presentSinkValue);
}

void append(const Params& p, const Kernels& kernels, const Parallel& parallel) {
  const int64_t pairs = p.batchSize * p.numKvHeads;
  const auto one = [&](size_t index) {
    const auto pair = static_cast<int64_t>(index);
    kernels.append(p, pair / p.numKvHeads, pair % p.numKvHeads);
  };
  if (pairs * p.sequenceLength * p.headDim >= kLargeAppend) return forEach(parallel, pairs, one);
  for (int64_t pair = 0; pair < pairs; ++pair) one(pair);
}

void clearPadding(const Params& p) {
  const size_t row = static_cast<size_t>(p.headDim) * elementSize(p);
  for (int64_t b = 0; b < p.batchSize; ++b) {
    const int64_t padding = p.sequenceLength - p.newLength[b];
    for (int64_t h = 0; padding > 0 && h < p.numHeads; ++h) {
      const size_t start = (b * p.numHeads + h) * p.sequenceLength + p.newLength[b];
      std::memset(static_cast<char*>(p.output) + start * row, 0, padding * row);
    }
  }
}

// Items in order; those of equal queries stand together, the first of them takes the sinks. Where
// a sequence is cut depends on that sequence alone, and so does the order of its sums: what shares
// the batch with it changes none of its bits.
std::vector<Item> plan(const Params& p) {
  std::vector<Item> items;
  const int64_t blockSteps = std::max<int64_t>(1, kBlockRows / (p.numHeads / p.numKvHeads));
  for (int64_t b = 0; b < p.batchSize; ++b) {
    const int64_t past = p.pastLength[b], blocks = ceilDivide(p.newLength[b], blockSteps);
    const int64_t unsplit = std::max<int64_t>(1, p.numKvHeads * blocks);
    const int64_t mostSplits = std::clamp<int64_t>(kEnoughItems / unsplit, 1, kMaxSplits);
    for (int64_t step = 0; step < p.newLength[b]; step += blockSteps) {
      const int64_t steps = std::min(blockSteps, p.newLength[b] - step);
      const int64_t begin = std::max<int64_t>(0, past + step - p.windowSize + 1);
      const int64_t end = past + step + steps;
      const int64_t splits = std::clamp((end - begin) / kSplitKeys, int64_t{1}, mostSplits);
      const int64_t length = ceilDivide(end - begin, splits);
      for (int64_t g = 0; g < p.numKvHeads; ++g) {
        for (int64_t first = begin; first < end; first += length) {
          items.push_back(
              {b, g, step, steps, first, std::min(end, first + length), first == begin, nullptr});
        }
      }
    }
  }
  return items;
}

bool sameQueries(const Item& a, const Item& b) {
  return a.batch == b.batch && a.kvHead == b.kvHead && a.firstStep == b.firstStep;
}

// Calls body(first, count) for each run of items with the same queries.
template <typename Body>
void forEachQueries(const std::vector<Item>& items, Body body) {
  for (size_t first = 0; first < items.size();) {
    size_t end = first + 1;
    while (end < items.size() && sameQueries(items[first], items[end])) ++end;
    body(first, end - first);
    first = end;
  }
}

bool attend(const Params& p, const Kernels& kernels, const Parallel& parallel) {
  std::vector<Item> items = plan(p);
  if (items.empty()) return true;
  size_t partial = 0;
  forEachQueries(items, [&](size_t first, size_t count) {
    if (count > 1) partial += count * kernels.partialFloats(p, items[first].numSteps);
  });
  float* memory = partial == 0 ? nullptr : partialArena.take(partial);
  if (partial != 0 && memory == nullptr) return false;
  forEachQueries(items, [&](size_t first, size_t count) {
    for (size_t i = first; count > 1 && i < first + count; ++i) {
      items[i].partial = memory;
      memory += kernels.partialFloats(p, items[i].numSteps);
    }
  });

  std::vector<char> done(items.size(), 0);
  forEach(parallel, items.size(), [&](size_t i) {
    float* own = scratchArena.take(kernels.scratchFloats(p, items[i].numSteps));
    if (own == nullptr) return;
    kernels.attend(p, items[i], own);
    done[i] = 1;
  });
  if (std::find(done.begin(), done.end(), 0) != done.end()) return false;
  forEachQueries(items, [&](size_t first, size_t count) {
    if (count > 1) kernels.combine(p, &items[first], count);
  });
  return true;
}

// What the host must know of the lengths before anything is written.
std::string checkLengths(const Params& p) {
  for (int64_t b = 0; b < p.batchSize; ++b) {
    const int64_t past = p.pastLength[b], count = p.newLength[b];
    if (past < 0) return "past_length is negative";
    if (count < 0 || count > p.sequenceLength) return "new_length is outside 0 … S";
    if (past > kMaxPosition - count) return "positions go beyond 2^40";
    // A ring that has not wrapped holds every position.
    if (past + count <= p.capacity || count == 0) continue;
    const std::string problem = checkRing(p.capacity, p.windowSize, count);
    if (!problem.empty()) return problem;
  }
  return {};
}

// Fastest first.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Every processor with AVX2 and FMA has F16C, which older compilers cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512vnni")) sets.push_back(&kAvx512Vnni);
    sets.push_back(&kAvx512);
  }
  if (avx2) sets.push_back(&kAvx2);
#endif
  sets.push_back(&kPortable);
  return sets;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> kernels{supported().front()};
  return kernels;
}

}  // namespace

const Kernels& activeKernels() { return *active().load(std::memory_order_relaxed); }

bool useKernels(const char* name) {
  for (const Kernels* kernels : supported()) {
    if (std::strcmp(kernels->name, name) == 0) {
      active() = kernels;
      return true;
    }
  }
  return false;
}

std::string lambdaAttention(const Params& p, const Kernels& kernels, const Parallel& parallel) {
  std::string problem = checkLengths(p);
  if (!problem.empty()) return problem;
  carryOver(p, parallel);
  append(p, kernels, parallel);
  clearPadding(p);
  return attend(p, kernels, parallel) ? "" : "no memory for attention's scratch space";
}

}  // namespace lminf::cpu
