#include "cpu_kernel.h"

#include <exception>

#include "cpu/attention.h"

namespace lminf {

abi::Status* CpuKernel::compute(abi::KernelContext* context) noexcept {
  try {
    LambdaAttentionParams params = layer_;
    if (abi::Status* wrong = readCall(api_, context, &params)) return wrong;
    Pool pool{api_, context, nullptr};
    const std::string problem = cpu::lambdaAttention(params, cpu::activeKernels(), pool.parallel());
    if (pool.wrong != nullptr) return pool.wrong;
    return problem.empty() ? nullptr : invalid(api_, problem);
  } catch (const std::exception& error) {
    return invalid(api_, error.what());
  }
}

}  // namespace lminf
