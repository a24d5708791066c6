// What the CUDA kernels take, beyond the operator's own rules (../operator/rules.h): head
// dimensions, 32-bit offsets, aligned pointers, rings of the model's type or of int8.
//
// Plain C++17: no CUDA header, no device. Messages are as in rules.h.
#pragma once

#include <string>

#include "../operator/params.h"

namespace lminf {

// What is wrong with sizes, types and attributes, in one line; empty if nothing. Looks at no
// pointer, so a plugin can ask before any memory exists. Thread-safe, needs no device.
std::string validateSettings(const LambdaAttentionParams& params);

// validateSettings, and the pointers: null where a tensor is needed, or not aligned to 16 bytes
// (8 for int64, 4 for float tensors). Slopes and learned logits may be null: zeros and -inf then;
// so may positions, which are not read. Looks at no memory, needs no device.
std::string validate(const LambdaAttentionParams& params);

}  // namespace lminf
