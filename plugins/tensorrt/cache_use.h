// Where TensorRT has a plugin's caches, told to whoever runs the engine.
//
// A plugin says that past and present are one tensor, and TensorRT "may insert copies" (its
// header). Copies are right and slow, and show nowhere else: where past and present have two
// addresses the kernels copy; where they have one that the session did not bind, TensorRT does.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../operator/contract.h"

namespace lminf::tensorrt {

// Take note of the caches of one step of one layer; returns how many of them are copied by the
// kernels. inputs and outputs are the node's; without sink tokens its sinks are no caches.
std::int32_t noteCaches(const void* const* inputs, void* const* outputs, std::int32_t numOutputs,
                        std::int64_t numSinkTokens) noexcept;

}  // namespace lminf::tensorrt

// What the library tells: C functions, for any thread.
extern "C" {

// Caches of all steps so far whose past and present had one address, in this process.
std::uint64_t lminfCachesInPlace();

// The same of those that had two, which the kernels copied.
std::uint64_t lminfCachesApart();

// From now on write the addresses of the caches that this thread enqueues, past and present in
// turns, to `addresses`, which has room for so many pairs; `count` becomes the number of caches,
// even where the room is smaller. A null pointer ends it.
void lminfRecordCaches(const void** addresses, std::uint64_t room, std::uint64_t* count);

}  // extern "C"
