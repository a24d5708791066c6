#include "c_api.h"

#include <cstring>

#include "../operator/rules.h"
#include "plan.h"
#include "validate.h"

std::size_t lminfParamsSize() { return sizeof(lminf::LambdaAttentionParams); }

std::size_t lminfValidate(const lminf::LambdaAttentionParams* params, char* message,
                          std::size_t messageBytes) {
  std::string problem = lminf::validate(*params);
  if (!problem.empty()) problem = std::string(lminf::nameOf(*params)) + ": " + problem;
  if (messageBytes > 0) {
    const std::size_t count = problem.size() < messageBytes ? problem.size() : messageBytes - 1;
    std::memcpy(message, problem.data(), count);
    message[count] = '\0';
  }
  return problem.size();
}

std::size_t lminfWorkspaceSize(const lminf::LambdaAttentionParams* params) {
  return lminf::workspaceSize(*params);
}

std::size_t lminfArrivalBytes(const lminf::LambdaAttentionParams* params) {
  return lminf::arrivalBytes(*params);
}

int lminfLaunchWith(const lminf::LambdaAttentionParams* params, int preference, int splits,
                    int startsEarly, int appendsInDecode, void* arrivals, void* workspace,
                    std::size_t workspaceBytes, void* stream) {
  lminf::LaunchChoices choices;
  choices.preference = static_cast<lminf::KernelPreference>(preference);
  choices.splits = splits;
  choices.startsEarly = startsEarly != 0;
  choices.appendsInDecode = appendsInDecode != 0;
  choices.arrivals = static_cast<std::uint32_t*>(arrivals);
  return lminf::launchWith(*params, choices, workspace, workspaceBytes,
                           static_cast<cudaStream_t>(stream));
}

void lminfPlan(const lminf::LambdaAttentionParams* params, int multiprocessors,
               std::size_t sharedBytes, int hopper, std::size_t workspaceBytes, int preference,
               std::int64_t* plan) {
  lminf::DeviceLimits limits;
  limits.multiprocessors = multiprocessors;
  limits.sharedBytesPerBlock = sharedBytes;
  limits.sharedBytesPerMultiprocessor = sharedBytes;
  limits.hopper = hopper != 0;
  const lminf::AttentionPlan chosen = lminf::planAttention(
      *params, limits, workspaceBytes, static_cast<lminf::KernelPreference>(preference));
  const std::int64_t numbers[] = {static_cast<std::int64_t>(chosen.kernel),
                                  chosen.rowsPerBlock,
                                  chosen.rowBlocks,
                                  chosen.splits,
                                  chosen.threads,
                                  chosen.keysPerTile,
                                  static_cast<std::int64_t>(chosen.sharedBytes)};
  std::memcpy(plan, numbers, sizeof(numbers));
}

int lminfHasHopper() {
#if defined(LMINF_HOPPER)
  return 1;
#else
  return 0;
#endif
}

const char* lminfErrorName(int status) {
  return cudaGetErrorName(static_cast<cudaError_t>(status));
}
