#include "cpu_kernel.h"

#include <exception>

#include "cpu/attention.h"

namespace lminf {
namespace {

cpu::Params paramsOf(const Call& call, const Attributes& a, abi::ElementType element) {
  const Shape &query = call.shapes[kQuery], &ring = call.shapes[kPastKey];
  const Shape& sinks = call.shapes[kPastSinkKey];
  const auto floats = [&](Input i) { return static_cast<const float*>(call.inputs[i]); };
  const auto integers = [&](Input i) { return static_cast<const int64_t*>(call.inputs[i]); };
  cpu::Params p{};
  p.batch = query[0], p.heads = query[1], p.steps = query[2], p.headDim = query[3];
  p.kvHeads = ring[1], p.capacity = ring[2];
  p.pastSinkBatch = sinks[0], p.sinkSlots = sinks[2];
  p.numSinkTokens = a.numSinkTokens, p.windowSize = a.windowSize;
  p.distanceLimit = a.distanceLimit, p.rotaryDim = a.rotaryDim;
  p.interleaved = a.rotaryInterleaved != 0, p.scale = a.scale, p.softcap = a.softcap;
  p.element = element == abi::kFloat16 ? cpu::Element::kHalf : cpu::Element::kFloat;
  p.int8Rings = a.int8Cache;
  p.query = call.inputs[kQuery], p.key = call.inputs[kKey], p.value = call.inputs[kValue];
  p.pastKey = call.inputs[kPastKey], p.pastValue = call.inputs[kPastValue];
  p.pastSinkKey = call.inputs[kPastSinkKey], p.pastSinkValue = call.inputs[kPastSinkValue];
  p.pastLength = integers(kPastLength), p.newLength = integers(kNewLength);
  p.cos = floats(kCos), p.sin = floats(kSin);
  p.limitCos = floats(kLimitCos), p.limitSin = floats(kLimitSin);
  p.alibiSlopes = floats(kAlibiSlopes), p.sinkLogits = floats(kSinkLogits);
  p.output = call.outputs[kOutput];
  p.presentKey = call.outputs[kPresentKey], p.presentValue = call.outputs[kPresentValue];
  p.presentSinkKey = call.outputs[kPresentSinkKey];
  p.presentSinkValue = call.outputs[kPresentSinkValue];
  if (a.int8Cache) {
    p.pastKeyScale = floats(kPastKeyScale), p.pastValueScale = floats(kPastValueScale);
    p.presentKeyScale = static_cast<float*>(call.outputs[kPresentKeyScale]);
    p.presentValueScale = static_cast<float*>(call.outputs[kPresentValueScale]);
  }
  return p;
}

}  // namespace

abi::Status* CpuKernel::compute(abi::KernelContext* context) noexcept {
  try {
    Call call;
    if (abi::Status* wrong = readCall(api_, context, attributes_, &call)) return wrong;
    Pool pool{api_, context, nullptr};
    const char* wrong = cpu::lambdaAttention(paramsOf(call, attributes_, element_),
                                             cpu::activeKernels(), pool.parallel());
    if (pool.wrong != nullptr) return pool.wrong;
    return wrong == nullptr ? nullptr : invalid(api_, wrong);
  } catch (const std::exception& error) {
    return invalid(api_, error.what());
  }
}

}  // namespace lminf
