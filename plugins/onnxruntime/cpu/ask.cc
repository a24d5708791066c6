// How this processor streams best.
#include "ask.h"

namespace lminf::cpu {
namespace {

bool streamsBestAsUsedOnce() noexcept {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace

bool asksForOnce = streamsBestAsUsedOnce();

}  // namespace lminf::cpu
