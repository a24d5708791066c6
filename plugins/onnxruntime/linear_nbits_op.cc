#include "linear_nbits_op.h"

#include <exception>
#include <string>

#include "cpu/int8_linear.h"
#include "tensor.h"

namespace lminf {
namespace {

// At this level of accuracy MatMulNBits rounds activations to int8.
constexpr int64_t kRoundedActivations = 4;

abi::Status* failure(const abi::Api* api, const std::string& what) {
  return abi::call<abi::kCreateStatus>(api, abi::kInvalidArgument, what.c_str());
}

}  // namespace

abi::Status* readAttributes(const abi::Api* api, const abi::KernelInfo* info,
                            NBitsAttributes* out) {
  const std::pair<const char*, int64_t*> integers[] = {{"K", &out->inFeatures},
                                                       {"N", &out->outFeatures},
                                                       {"bits", &out->bits},
                                                       {"block_size", &out->blockSize},
                                                       {"accuracy_level", &out->accuracyLevel}};
  for (const auto& [name, value] : integers) {
    if (abi::Status* wrong = abi::call<abi::kKernelInfoGetAttributeInt64>(api, info, name, value)) {
      return wrong;
    }
  }
  if (out->bits != 4 && out->bits != 8) {
    return failure(api,
                   "lminf::LinearNBits: bits must be 4 or 8, found " + std::to_string(out->bits));
  }
  const int64_t size = out->blockSize;
  if (size < 16 || size > 256 || (size & (size - 1)) != 0) {
    return failure(api, "lminf::LinearNBits: block_size must be 16, 32, 64, 128 or 256, found " +
                            std::to_string(size));
  }
  return nullptr;
}

abi::Status* LinearNBitsKernel::invalid(const std::string& what) const {
  return failure(api_, (adds_ ? "lminf::LinearNBitsAdd: " : "lminf::LinearNBits: ") + what);
}

abi::Status* LinearNBitsKernel::compute(abi::KernelContext* context) noexcept {
  try {
    return run(context);
  } catch (const std::exception& error) {
    return invalid(error.what());
  }
}

abi::Status* LinearNBitsKernel::run(abi::KernelContext* context) {
  const size_t zeroPoints = adds_ ? 4 : 3;
  InputTensor room[5];
  const InputTensor* inputs[5] = {};
  for (size_t i = 0; i <= zeroPoints; ++i) {
    if (abi::Status* wrong = inputs_.read(api_, context, i, &room[i], &inputs[i])) return wrong;
  }
  const InputTensor &x = *inputs[0], &weight = *inputs[1], &scales = *inputs[2],
                    &addend = *inputs[3], &zeros = *inputs[zeroPoints];
  const auto& a = attributes_;
  cpu::Blocks blocks{};
  blocks.bits = a.bits, blocks.size = a.blockSize, blocks.scaleType = dataTypeOf(scaleElement_);
  blocks.perRow = (a.inFeatures + a.blockSize - 1) / a.blockSize;
  if (x.shape.size() != 2 || x.shape[1] != a.inFeatures) {
    return invalid("x has shape " + text(x.shape) + ", expected (M, " +
                   std::to_string(a.inFeatures) + ")");
  }
  if (!weight.has({a.outFeatures, blocks.perRow, blocks.bytes()}) ||
      !scales.has({a.outFeatures, blocks.perRow})) {
    return invalid("weight has shape " + text(weight.shape) + " and scales " + text(scales.shape) +
                   ", expected " + text({a.outFeatures, blocks.perRow, blocks.bytes()}) + " and " +
                   text({a.outFeatures, blocks.perRow}));
  }
  if (zeros.data != nullptr && !zeros.has({a.outFeatures, blocks.zeroBytes()})) {
    return invalid("zero_points has shape " + text(zeros.shape) + ", expected " +
                   text({a.outFeatures, blocks.zeroBytes()}));
  }
  const Shape result = {x.shape[0], a.outFeatures};
  if (adds_ && addend.shape != result && !addend.has({a.outFeatures})) {
    return invalid("addend has shape " + text(addend.shape) + ", expected " + text(result) +
                   " or " + text({a.outFeatures}));
  }
  const auto bytes = [&](int64_t ofRow) { return static_cast<size_t>(a.outFeatures * ofRow); };
  const int64_t scaleSize = blocks.scaleType == DataType::kFloat16 ? 2 : 4;
  const void* packed = packed_.at(weight.data, bytes(blocks.rowBytes()));
  const void* zeroBytes = zeros_.at(zeros.data, bytes(blocks.zeroBytes()));
  blocks.packed = static_cast<const uint8_t*>(packed);
  blocks.scales = scales_.at(scales.data, bytes(blocks.perRow * scaleSize));
  blocks.zeroPoints = static_cast<const uint8_t*>(zeroBytes);
  cpu::Linear p{};
  p.tokens = x.shape[0], p.outFeatures = a.outFeatures, p.inFeatures = a.inFeatures;
  p.dataType = dataTypeOf(element_);
  p.blocks = &blocks;
  p.addend = adds_ ? addend.data : nullptr;
  p.addendStride = adds_ && addend.shape.size() == 2 ? a.outFeatures : 0;
  if (abi::Status* wrong = findTensor(api_, context, 0, result, &p.out)) return wrong;
  Pool pool{api_, context, nullptr};
  const cpu::Parallel parallel = pool.parallel();
  const char* wrong =
      a.accuracyLevel == kRoundedActivations
          ? cpu::int8Linear(p, x.data, cpu::activeLinear(), cpu::activeInt8Linear(), parallel)
          : cpu::linear(p, x.data, cpu::activeLinear(), parallel);
  if (pool.wrong != nullptr) return pool.wrong;
  return wrong == nullptr ? nullptr : invalid(wrong);
}

}  // namespace lminf
