// Tensors as an operator of ours meets them in a call.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include "../operator/rules.h"
#include "cpu/parallel.h"
#include "ort_abi.h"

namespace lminf {

// The type of tensors of floats; float32 for any other.
DataType dataTypeOf(abi::ElementType element);

// One input's shape and data.
abi::Status* readTensor(const abi::Api* api, const abi::KernelContext* context, size_t index,
                        Shape* shape, const void** data);

// One input of a call.
struct InputTensor {
  Shape shape;
  const void* data = nullptr;  // null where an optional input is missing

  bool has(std::initializer_list<int64_t> sizes) const;
};

// The inputs of an operator. Those that the graph holds as constants, such as weights, are read
// once, when the kernel is made: asking for a tensor takes longer than streaming a small one.
class InputTensors {
 public:
  // Reads the constants among the first `count` inputs. Returns null, or what is wrong.
  abi::Status* keepConstants(const abi::Api* api, const abi::KernelInfo* info, size_t count);

  // Lets *found be input i of a call; one that is no constant is read into *room.
  abi::Status* read(const abi::Api* api, const abi::KernelContext* context, size_t i,
                    InputTensor* room, const InputTensor** found) const;

 private:
  std::vector<std::optional<InputTensor>> constants_;
};

// Allocates or finds an output; *data stays null where it is not used.
abi::Status* findTensor(const abi::Api* api, abi::KernelContext* context, size_t index,
                        const Shape& shape, void** data);

// onnxruntime's own threads, for cpu::Parallel; it lives as long as the call.
struct Pool {
  const abi::Api* api;
  const abi::KernelContext* context;
  abi::Status* wrong;

  cpu::Parallel parallel();
};

}  // namespace lminf
