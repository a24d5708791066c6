// Tensors as an operator of ours meets them in a call.
#pragma once

#include "../operator/rules.h"
#include "cpu/parallel.h"
#include "ort_abi.h"

namespace lminf {

// The type of tensors of floats; float32 for any other.
DataType dataTypeOf(abi::ElementType element);

// One input's shape and data.
abi::Status* readTensor(const abi::Api* api, const abi::KernelContext* context, size_t index,
                        Shape* shape, const void** data);

// The same of an input that may be missing, whose data then are null.
abi::Status* readOptionalTensor(const abi::Api* api, const abi::KernelContext* context,
                                size_t index, Shape* shape, const void** data);

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
