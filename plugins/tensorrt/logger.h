// TensorRT's logger, found at run time.
//
// One library serves TensorRT 10.3 to 11.x, and of all it touches only ILoggerFinder and ILogger
// have another virtual table in 11 than in 10: they became versioned interfaces. So the release
// that loaded the library is asked, and the headers it was compiled with do not matter.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace lminf::tensorrt {

// Remember TensorRT's finder, which it passes when it loads the library.
void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// Tell the user what went wrong, with the operator's name before it: through TensorRT's logger, or
// on stderr where there is none.
void logError(const std::string& problem) noexcept;

// The same for what is right and not as it should be.
void logWarning(const std::string& text) noexcept;

}  // namespace lminf::tensorrt
