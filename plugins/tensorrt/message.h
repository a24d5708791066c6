// One-line messages, and callbacks nothing is thrown through.
#pragma once

#include <exception>
#include <sstream>
#include <string>

#include "logger.h"

namespace lminf::tensorrt {

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  text << "LambdaAttention: ";
  (text << ... << parts);
  return text.str();
}

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
