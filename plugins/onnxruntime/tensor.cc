#include "tensor.h"

#include <algorithm>

namespace lminf {
namespace {

abi::Status* shapeOf(const abi::Api* api, const abi::Value* value, Shape* shape) {
  abi::TensorInfo* info = nullptr;
  if (abi::Status* wrong = abi::call<abi::kGetTensorTypeAndShape>(api, value, &info)) return wrong;
  size_t rank = 0;
  abi::Status* wrong =
      abi::call<abi::kGetDimensionsCount>(api, static_cast<const abi::TensorInfo*>(info), &rank);
  if (wrong == nullptr) {
    shape->resize(rank);
    wrong = abi::call<abi::kGetDimensions>(api, static_cast<const abi::TensorInfo*>(info),
                                           shape->data(), rank);
  }
  abi::call<abi::kReleaseTensorTypeAndShapeInfo>(api, info);
  return wrong;
}

abi::Status* readValue(const abi::Api* api, const abi::Value* value, Shape* shape,
                       const void** data) {
  abi::Status* wrong = shapeOf(api, value, shape);
  void* found = nullptr;
  if (wrong == nullptr) {
    wrong = abi::call<abi::kGetTensorMutableData>(api, const_cast<abi::Value*>(value), &found);
  }
  *data = found;
  return wrong;
}

// 0 lets onnxruntime deal the indices out as threads get free.
void onPool(void* data, size_t count, abi::ParallelBody body, void* argument) {
  Pool* pool = static_cast<Pool*>(data);
  abi::Status* wrong = abi::call<abi::kKernelContextParallelFor>(pool->api, pool->context, body,
                                                                 count, size_t{0}, argument);
  if (pool->wrong == nullptr) pool->wrong = wrong;
}

}  // namespace

DataType dataTypeOf(abi::ElementType element) {
  if (element == abi::kFloat16) return DataType::kFloat16;
  return element == abi::kBFloat16 ? DataType::kBfloat16 : DataType::kFloat32;
}

abi::Status* readTensor(const abi::Api* api, const abi::KernelContext* context, size_t index,
                        Shape* shape, const void** data) {
  const abi::Value* value = nullptr;
  abi::Status* wrong = abi::call<abi::kKernelContextGetInput>(api, context, index, &value);
  return wrong == nullptr ? readValue(api, value, shape, data) : wrong;
}

bool InputTensor::has(std::initializer_list<int64_t> sizes) const {
  return std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end());
}

abi::Status* InputTensors::keepConstants(const abi::Api* api, const abi::KernelInfo* info,
                                         size_t count) {
  constants_.assign(count, std::nullopt);
  for (size_t i = 0; i < count; ++i) {
    int constant = 0;
    const abi::Value* value = nullptr;
    if (abi::Status* wrong =
            abi::call<abi::kKernelInfoGetConstantInput>(api, info, i, &constant, &value)) {
      return wrong;
    }
    if (constant == 0 || value == nullptr) continue;
    InputTensor& kept = constants_[i].emplace();
    if (abi::Status* wrong = readValue(api, value, &kept.shape, &kept.data)) return wrong;
  }
  return nullptr;
}

abi::Status* InputTensors::read(const abi::Api* api, const abi::KernelContext* context, size_t i,
                                InputTensor* room, const InputTensor** found) const {
  *found = room;
  if (const std::optional<InputTensor>& constant = constants_[i]; constant.has_value()) {
    *found = &*constant;
    return nullptr;
  }
  const abi::Value* value = nullptr;
  abi::Status* wrong = abi::call<abi::kKernelContextGetInput>(api, context, i, &value);
  return wrong == nullptr && value != nullptr ? readValue(api, value, &room->shape, &room->data)
                                              : wrong;
}

abi::Status* findTensor(const abi::Api* api, abi::KernelContext* context, size_t index,
                        const Shape& shape, void** data) {
  abi::Value* value = nullptr;
  const int64_t* dims = shape.data();
  abi::Status* wrong =
      abi::call<abi::kKernelContextGetOutput>(api, context, index, dims, shape.size(), &value);
  *data = nullptr;
  if (wrong == nullptr && value != nullptr) {
    wrong = abi::call<abi::kGetTensorMutableData>(api, value, data);
  }
  return wrong;
}

cpu::Parallel Pool::parallel() { return {this, onPool}; }

}  // namespace lminf
