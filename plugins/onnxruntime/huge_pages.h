// Memory for onnxruntime's copies of the weights, on huge pages where the system has them.
//
// Decoding streams every weight once a token, and with pages of 4 KiB address translation takes a
// good part of that time, in virtual machines most of all.
#pragma once

#include "ort_abi.h"

namespace lminf {

// Registers the allocator with onnxruntime's environment, once. Sessions that ask for it by
// "session.use_env_allocators" use it, others do not. Returns whether it is registered.
bool registerHugePages(const abi::Api* api);

// Asks for huge pages where memory that stays lies, a mapped file's too: Linux can back it by them
// where the file system keeps large folios. Advice only.
void adviseHugePages(const void* memory, size_t size);

}  // namespace lminf
