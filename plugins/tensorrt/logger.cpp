#include "logger.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdio>

#include "../operator/contract.h"

namespace lminf::tensorrt {
namespace {

constexpr std::int32_t kError = 1;    // ILogger::Severity::kERROR
constexpr std::int32_t kWarning = 2;  // ILogger::Severity::kWARNING
constexpr std::int32_t kReleasesPerMajor = 10000;

// Where findLogger and log stand in the virtual tables of a major release, both at the same
// place: first in 10, behind the two functions and two destructors of a versioned interface in
// 11. -1 for releases that are not known.
int placeIn(std::int32_t majorRelease) {
  if (majorRelease == 10) return 0;
  return majorRelease == 11 ? 4 : -1;
}

// A function of an object's virtual table, to be called with the object before its arguments.
template <class Function>
Function* virtualFunction(void* object, int place) {
  return reinterpret_cast<Function*>((*static_cast<void***>(object))[place]);
}

// Which release the library belongs to that an object's virtual table lies in; 0 if unknown.
std::int32_t majorReleaseOf(const void* object) noexcept {
  Dl_info info{};
  const void* table = *static_cast<const void* const*>(object);
  if (dladdr(table, &info) == 0 || info.dli_fname == nullptr) return 0;
  void* library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  // A program TensorRT is linked into has no name to open; its symbols are global.
  void* found = dlsym(library != nullptr ? library : RTLD_DEFAULT, "getInferLibVersion");
  if (library != nullptr) dlclose(library);  // NOLOAD has counted it once more
  if (found == nullptr) return 0;
  return reinterpret_cast<std::int32_t (*)()>(found)() / kReleasesPerMajor;
}

std::atomic<nvinfer1::ILoggerFinder*> loggerFinder{nullptr};
std::atomic<std::int32_t> majorRelease{0};

bool logThroughTensorRT(std::int32_t severity, const std::string& text) {
  void* finder = loggerFinder.load();
  const int place = placeIn(majorRelease.load());
  if (finder == nullptr || place < 0) return false;
  void* logger = virtualFunction<void*(void*)>(finder, place)(finder);
  if (logger == nullptr) return false;
  virtualFunction<void(void*, std::int32_t, const char*)>(logger, place)(logger, severity,
                                                                         text.c_str());
  return true;
}

void log(std::int32_t severity, const std::string& text) noexcept {
  bool logged = false;
  try {
    logged = logThroughTensorRT(severity, std::string(kName) + ": " + text);
  } catch (...) {
    logged = false;  // findLogger is not noexcept; the message still has somewhere to go
  }
  if (logged) return;
  std::fprintf(stderr, "%s: %s\n", kName, text.c_str());
}

}  // namespace

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
  majorRelease.store(finder != nullptr ? majorReleaseOf(finder) : 0);
  loggerFinder.store(finder);
}

void logError(const std::string& problem) noexcept { log(kError, problem); }

void logWarning(const std::string& text) noexcept { log(kWarning, text); }

}  // namespace lminf::tensorrt
