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
  InputTensor room[3];
  const InputTensor* inputs[3] = {&room[0], &room[1], &room[2]};
  for (size_t i = 0; i < (adds_ ? 3 : 2); ++i) {
    if (abi::Status* wrong = inputs_.read(api_, context, i, &room[i], &inputs[i])) return wrong;
  }
  const Shape &x = inputs[0]->shape, &weight = inputs[1]->shape, &addend = inputs[2]->shape;
  if (x.size() != 2 || weight.size() != 2 || x[1] != weight[1]) {
    return invalid(
        ("x has shape " + text(x) + " and weight " + text(weight) + ", expected (M, K) and (N, K)")
            .c_str());
  }
  const Shape result = {x[0], weight[0]};
  if (adds_ && addend != result && !inputs[2]->has({weight[0]})) {
    return invalid(("addend has shape " + text(addend) + ", expected " + text(result) + " or " +
                    text({weight[0]}))
                       .c_str());
  }
  cpu::Linear p{};
  p.tokens = x[0], p.outFeatures = weight[0], p.inFeatures = x[1];
  p.dataType = dataTypeOf(element_);
  p.addend = inputs[2]->data;
  p.addendStride = addend.size() == 2 ? weight[0] : 0;
  if (abi::Status* wrong = findTensor(api_, context, 0, result, &p.out)) return wrong;
  const int64_t itemSize = p.dataType == DataType::kFloat16 ? 2 : 4;
  p.weight = weight_.at(inputs[1]->data, static_cast<size_t>(weight[0] * weight[1] * itemSize));
  Pool pool{api_, context, nullptr};
  const char* wrong = cpu::linear(p, inputs[0]->data, cpu::activeLinear(), pool.parallel());
  if (pool.wrong != nullptr) return pool.wrong;
  return wrong == nullptr ? nullptr : invalid(wrong);
}

}  // namespace lminf
