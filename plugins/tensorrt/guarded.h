// Callbacks nothing is thrown through.
#pragma once

#include <exception>

#include "../operator/message.h"
#include "logger.h"

namespace lminf::tensorrt {

// Run a callback of TensorRT's: nothing may be thrown through it.
// Returns what `body` returns, or `failure` after logging the exception's text.
template <class Result, class Body>
Result guarded(const char* where, Result failure, Body body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    try {
      logError(message(where, " failed: ", error.what()));
    } catch (...) {  // no memory left even for the message
      return failure;
    }
  } catch (...) {
    return failure;
  }
  return failure;
}

}  // namespace lminf::tensorrt
