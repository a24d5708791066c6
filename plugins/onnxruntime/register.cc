// What onnxruntime calls on SessionOptions.register_custom_ops_library.
#include <mutex>

#include "cpu/ask.h"
#include "cpu/attention.h"
#include "cpu/draw.h"
#include "cpu_kernel.h"
#include "huge_pages.h"
#include "lambda_attention_op.h"
#include "linear_nbits_op.h"
#include "linear_op.h"
#if defined(LMINF_ORT_CUDA)
#include <string>

#include "cuda_kernel.h"
#include "plan.h"
#endif

namespace lminf {
namespace {

// One line per execution provider and element type.
const Op<abi::kFloat, CpuKernel> cpuFloat("CPUExecutionProvider");
const Op<abi::kFloat16, CpuKernel> cpuHalf("CPUExecutionProvider");
const Op<abi::kFloat, CpuKernel, true> cpuFloatInt8Cache("CPUExecutionProvider");
const Op<abi::kFloat16, CpuKernel, true> cpuHalfInt8Cache("CPUExecutionProvider");
const Op<abi::kFloat, CpuKernel, true, true> cpuFloatKeyBias("CPUExecutionProvider");
const Op<abi::kFloat16, CpuKernel, true, true> cpuHalfKeyBias("CPUExecutionProvider");
#if defined(LMINF_ORT_CUDA)
const Op<abi::kFloat, CudaKernel> cudaFloat("CUDAExecutionProvider");
const Op<abi::kFloat16, CudaKernel> cudaHalf("CUDAExecutionProvider");
const Op<abi::kBFloat16, CudaKernel> cudaBfloat("CUDAExecutionProvider");
const abi::CustomOp* const kKernels[] = {&cpuFloat,         &cpuHalf,         &cpuFloatInt8Cache,
                                         &cpuHalfInt8Cache, &cpuFloatKeyBias, &cpuHalfKeyBias,
                                         &cudaFloat,        &cudaHalf,        &cudaBfloat};
constexpr const char* kProviders = "cpu cuda";

const char* cudaHeadDims() {
  static const std::string dims = [] {
    std::string found;
    for (std::int64_t dim = 1; dim <= 1024; ++dim) {
      if (isSupportedHeadDim(dim)) found += (found.empty() ? "" : " ") + std::to_string(dim);
    }
    return found;
  }();
  return dims.c_str();
}
#else
// Not beside a GPU's kernels: onnxruntime would bring the work to the only kernel it finds.
const LinearOp<abi::kFloat, false> linearFloat;
const LinearOp<abi::kFloat16, false> linearHalf;
const LinearOp<abi::kFloat, true> linearAddFloat;
const LinearOp<abi::kFloat16, true> linearAddHalf;
#if defined(__x86_64__)
const LinearNBitsOp<abi::kFloat, false> nbitsFloat;
const LinearNBitsOp<abi::kFloat16, false> nbitsHalf;
const LinearNBitsOp<abi::kFloat, true> nbitsAddFloat;
const LinearNBitsOp<abi::kFloat16, true> nbitsAddHalf;
const LinearNBitsOp<abi::kFloat, false, abi::kFloat16> nbitsHalfScales;
const LinearNBitsOp<abi::kFloat, true, abi::kFloat16> nbitsAddHalfScales;
#define LMINF_NBITS \
  &nbitsFloat, &nbitsHalf, &nbitsAddFloat, &nbitsAddHalf, &nbitsHalfScales, &nbitsAddHalfScales
#else
// Elsewhere onnxruntime's MatMulNBits has vectors for integers, and ours has none.
#define LMINF_NBITS
#endif
const abi::CustomOp* const kKernels[] = {&cpuFloat,         &cpuHalf,         &cpuFloatInt8Cache,
                                         &cpuHalfInt8Cache, &cpuFloatKeyBias, &cpuHalfKeyBias,
                                         &linearFloat,      &linearHalf,      &linearAddFloat,
                                         &linearAddHalf,    LMINF_NBITS};
constexpr const char* kProviders = "cpu";
const char* cudaHeadDims() { return ""; }
#endif

// The domain outlives every session that uses it, so it is made once and never released.
abi::Status* makeDomain(const abi::Api* api, abi::CustomOpDomain** domain) {
  abi::CustomOpDomain* made = nullptr;
  abi::Status* wrong = abi::call<abi::kCreateCustomOpDomain>(api, kDomain, &made);
  for (const abi::CustomOp* op : kKernels) {
    if (wrong == nullptr) wrong = abi::call<abi::kCustomOpDomainAdd>(api, made, op);
  }
  if (wrong == nullptr) *domain = made;
  return wrong;
}

}  // namespace

extern "C" {

LMINF_ORT_EXPORT abi::Status* LMINF_ORT_CALL RegisterCustomOps(abi::SessionOptions* options,
                                                               const abi::ApiBase* base) {
  const abi::Api* api = base->getApi(abi::kApiVersion);
  if (api == nullptr) return nullptr;  // older than 1.17: the graph's own body runs instead
  static std::mutex mutex;
  static abi::CustomOpDomain* domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    registerHugePages(api);
    if (abi::Status* wrong = makeDomain(api, &domain)) return wrong;
  }
  return abi::call<abi::kAddCustomOpDomain>(api, options, domain);
}

// The operator's version this library implements, the providers it has kernels for (separated by
// blanks), and the instructions its CPU kernel runs on here.
LMINF_ORT_EXPORT int lminfOperatorVersion() { return kVersion; }
LMINF_ORT_EXPORT const char* lminfProviders() { return kProviders; }
// The same for rings of int8.
LMINF_ORT_EXPORT const char* lminfInt8CacheProviders() { return "cpu"; }
// The head dimensions that the kernels for CUDA take; none where there are none.
LMINF_ORT_EXPORT const char* lminfCudaHeadDims() { return cudaHeadDims(); }
LMINF_ORT_EXPORT const char* lminfInstructionSet() { return cpu::activeKernels().name; }

// For tests and measurements: runs on this set from now on; 0 where this processor cannot.
LMINF_ORT_EXPORT int lminfUseInstructionSet(const char* name) { return cpu::useKernels(name); }

// For measurements, between calls: whether memory that is read once is asked for as such
// (cpu/ask.h), and choosing.
LMINF_ORT_EXPORT int lminfAsksForOnce() { return cpu::asksForOnce; }
LMINF_ORT_EXPORT void lminfAskForOnce(int once) { cpu::asksForOnce = once != 0; }

// See cpu/draw.h.
LMINF_ORT_EXPORT int64_t lminfDrawToken(const float* logits, int64_t count, double inverse,
                                        int64_t topK, double topP, double leastExponent,
                                        double uniform) {
  return cpu::drawToken({logits, count, inverse, topK, topP, leastExponent, uniform},
                        cpu::activeDraw());
}
}  // extern "C"

}  // namespace lminf
