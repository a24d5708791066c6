#include "cache_use.h"

#include <atomic>

#include "../operator/rules.h"

namespace lminf::tensorrt {
namespace {

// Of this process: an engine is enqueued from any thread.
std::atomic<std::uint64_t> inPlace{0};
std::atomic<std::uint64_t> apart{0};

// What one thread asked to be told. TensorRT calls a plugin on the thread that enqueues the engine.
struct Record {
  const void** addresses = nullptr;
  std::uint64_t room = 0;
  std::uint64_t* count = nullptr;
};

thread_local Record record;

void write(const void* past, const void* present) {
  if (record.addresses == nullptr || record.count == nullptr) return;
  const std::uint64_t place = (*record.count)++;
  if (place >= record.room) return;
  record.addresses[2 * place] = past;
  record.addresses[2 * place + 1] = present;
}

}  // namespace

std::int32_t noteCaches(const void* const* inputs, void* const* outputs, std::int32_t numOutputs,
                        std::int64_t numSinkTokens) noexcept {
  std::int32_t caches = 0, copied = 0;
  for (std::int32_t output = 0; output < numOutputs; ++output) {
    const std::int32_t input = kUpdatedInput[output];
    if (input == kNone || (isSinkOutput(output) && numSinkTokens == 0)) continue;
    ++caches;
    if (inputs[input] != outputs[output]) ++copied;
    write(inputs[input], outputs[output]);
  }
  inPlace.fetch_add(static_cast<std::uint64_t>(caches - copied), std::memory_order_relaxed);
  apart.fetch_add(static_cast<std::uint64_t>(copied), std::memory_order_relaxed);
  return copied;
}

}  // namespace lminf::tensorrt

#define LMINF_EXPORT __attribute__((visibility("default")))

LMINF_EXPORT std::uint64_t lminfCachesInPlace() {
  return lminf::tensorrt::inPlace.load(std::memory_order_relaxed);
}

LMINF_EXPORT std::uint64_t lminfCachesApart() {
  return lminf::tensorrt::apart.load(std::memory_order_relaxed);
}

LMINF_EXPORT void lminfRecordCaches(const void** addresses, std::uint64_t room,
                                    std::uint64_t* count) {
  if (count != nullptr) *count = 0;
  lminf::tensorrt::record = {addresses, room, count};
}
