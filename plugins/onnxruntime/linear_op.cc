#include "linear_op.h"

#include <exception>
#include <string>

#include "cpu/linear.h"
#include "tensor.h"

namespace lminf {

abi::Status* LinearKernel::invalid(const char* what) const {
  const std::string whole = std::string(adds_ ? "lminf::LinearAdd: " : "lminf::Linear: ") + what;
  return abi::call<abi::kCreateStatus>(api_, abi::kInvalidArgument, whole.c_str());
}

abi::Status* LinearKernel::compute(abi::KernelContext* context) noexcept {
  try {
    return run(context);
  } catch (const std::exception& error) {
    return invalid(error.what());
  }
}

abi::Status* LinearKernel::run(abi::KernelContext* context) {
  Shape shapes[3];
  const void* data[3] = {};
  for (size_t i = 0; i < (adds_ ? 3 : 2); ++i) {
    if (abi::Status* wrong = readTensor(api_, context, i, &shapes[i], &data[i])) return wrong;
  }
  const auto& [x, weight, addend] = shapes;
  if (x.size() != 2 || weight.size() != 2 || x[1] != weight[1]) {
    return invalid(
        ("x has shape " + text(x) + " and weight " + text(weight) + ", expected (M, K) and (N, K)")
            .c_str());
  }
  const Shape result = {x[0], weight[0]};
  if (adds_ && addend != result && addend != Shape{weight[0]}) {
    return invalid(("addend has shape " + text(addend) + ", expected " + text(result) + " or " +
                    text({weight[0]}))
                       .c_str());
  }
  cpu::Linear p{};
  p.tokens = x[0], p.outFeatures = weight[0], p.inFeatures = x[1];
  p.dataType = dataTypeOf(element_);
  p.weight = data[1], p.addend = data[2];
  p.addendStride = addend.size() == 2 ? weight[0] : 0;
  if (abi::Status* wrong = findTensor(api_, context, 0, result, &p.out)) return wrong;
  const int64_t itemSize = p.dataType == DataType::kFloat16 ? 2 : 4;
  p.weight = weight_.at(p.weight, static_cast<size_t>(weight[0] * weight[1] * itemSize));
  Pool pool{api_, context, nullptr};
  const char* wrong = cpu::linear(p, data[0], cpu::activeLinear(), pool.parallel());
  if (pool.wrong != nullptr) return pool.wrong;
  return wrong == nullptr ? nullptr : invalid(wrong);
}

}  // namespace lminf
