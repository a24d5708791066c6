// Compiled only where onnxruntime's own header is present: our declarations are its declarations.
#include <onnxruntime_c_api.h>

#include <type_traits>

#include "ort_abi.h"

// The real header decorates its functions with attributes a type argument cannot carry.
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace abi = lminf::abi;

static_assert(ORT_API_VERSION >= abi::kApiVersion);

// The same call through both types, opaque pointers and enums translated.
template <typename T>
struct Theirs {
  using Type = T;
};
#define LMINF_IS(ours, theirs) \
  template <>                  \
  struct Theirs<abi::ours> {   \
    using Type = theirs;       \
  }
LMINF_IS(Status, OrtStatus);
LMINF_IS(SessionOptions, OrtSessionOptions);
LMINF_IS(CustomOpDomain, OrtCustomOpDomain);
LMINF_IS(CustomOp, OrtCustomOp);
LMINF_IS(KernelInfo, OrtKernelInfo);
LMINF_IS(KernelContext, OrtKernelContext);
LMINF_IS(Value, OrtValue);
LMINF_IS(TensorInfo, OrtTensorTypeAndShapeInfo);
LMINF_IS(Api, OrtApi);
LMINF_IS(Env, OrtEnv);
LMINF_IS(MemoryInfo, OrtMemoryInfo);
LMINF_IS(Allocator, OrtAllocator);
LMINF_IS(LogLevel, OrtLoggingLevel);
LMINF_IS(AllocatorType, OrtAllocatorType);
LMINF_IS(ErrorCode, OrtErrorCode);
LMINF_IS(ElementType, ONNXTensorElementDataType);
LMINF_IS(Characteristic, OrtCustomOpInputOutputCharacteristic);
LMINF_IS(MemoryType, OrtMemType);
template <typename T>
struct Theirs<const T> {
  using Type = const typename Theirs<T>::Type;
};
template <typename T>
struct Theirs<T*> {
  using Type = typename Theirs<T>::Type*;
};
template <typename R, typename... A>
struct Theirs<R (*)(A...)> {
  using Type = typename Theirs<R>::Type (*)(typename Theirs<A>::Type...);
};
template <typename R, typename... A>
struct Theirs<R (*)(A...) noexcept> {
  using Type = typename Theirs<R>::Type (*)(typename Theirs<A>::Type...);
};
template <typename T>
struct Plain {
  using Type = T;
};
template <typename R, typename... A>
struct Plain<R (*)(A...) noexcept> {
  using Type = R (*)(A...);
};
template <>
struct Theirs<abi::ParallelBody> {
  using Type = void (*)(void*, size_t);
};

#define LMINF_SAME_CALL(ours, theirs)                                                     \
  static_assert(offsetof(OrtApi, theirs) == abi::ours * sizeof(void*), #theirs " moved"); \
  static_assert(std::is_same_v<Theirs<abi::Signature<abi::ours>::Type>::Type,             \
                               Plain<decltype(OrtApi::theirs)>::Type>,                    \
                #theirs " has other arguments")
LMINF_SAME_CALL(kCreateStatus, CreateStatus);
LMINF_SAME_CALL(kCreateEnv, CreateEnv);
LMINF_SAME_CALL(kCreateCpuMemoryInfo, CreateCpuMemoryInfo);
LMINF_SAME_CALL(kRegisterAllocator, RegisterAllocator);
LMINF_SAME_CALL(kCreateCustomOpDomain, CreateCustomOpDomain);
LMINF_SAME_CALL(kCustomOpDomainAdd, CustomOpDomain_Add);
LMINF_SAME_CALL(kAddCustomOpDomain, AddCustomOpDomain);
LMINF_SAME_CALL(kGetTensorMutableData, GetTensorMutableData);
LMINF_SAME_CALL(kGetTensorElementType, GetTensorElementType);
LMINF_SAME_CALL(kGetDimensionsCount, GetDimensionsCount);
LMINF_SAME_CALL(kGetDimensions, GetDimensions);
LMINF_SAME_CALL(kGetTensorTypeAndShape, GetTensorTypeAndShape);
LMINF_SAME_CALL(kKernelInfoGetAttributeFloat, KernelInfoGetAttribute_float);
LMINF_SAME_CALL(kKernelInfoGetAttributeInt64, KernelInfoGetAttribute_int64);
LMINF_SAME_CALL(kKernelContextGetInput, KernelContext_GetInput);
LMINF_SAME_CALL(kKernelContextGetOutput, KernelContext_GetOutput);
LMINF_SAME_CALL(kReleaseStatus, ReleaseStatus);
LMINF_SAME_CALL(kReleaseTensorTypeAndShapeInfo, ReleaseTensorTypeAndShapeInfo);
LMINF_SAME_CALL(kReleaseCustomOpDomain, ReleaseCustomOpDomain);
LMINF_SAME_CALL(kKernelContextGetGpuComputeStream, KernelContext_GetGPUComputeStream);
LMINF_SAME_CALL(kKernelInfoGetConstantInput, KernelInfoGetConstantInput_tensor);
LMINF_SAME_CALL(kKernelContextParallelFor, KernelContext_ParallelFor);

#define LMINF_SAME_FIELD(ours, theirs) \
  static_assert(offsetof(abi::CustomOp, ours) == offsetof(OrtCustomOp, theirs), #theirs " moved")
static_assert(offsetof(abi::Allocator, alloc) == offsetof(OrtAllocator, Alloc));
static_assert(offsetof(abi::Allocator, free) == offsetof(OrtAllocator, Free));
static_assert(offsetof(abi::Allocator, info) == offsetof(OrtAllocator, Info));
static_assert(offsetof(abi::Allocator, reserve) == offsetof(OrtAllocator, Reserve));
LMINF_SAME_FIELD(version, version);
LMINF_SAME_FIELD(createKernel, CreateKernel);
LMINF_SAME_FIELD(getName, GetName);
LMINF_SAME_FIELD(getExecutionProviderType, GetExecutionProviderType);
LMINF_SAME_FIELD(getInputType, GetInputType);
LMINF_SAME_FIELD(getInputTypeCount, GetInputTypeCount);
LMINF_SAME_FIELD(getOutputType, GetOutputType);
LMINF_SAME_FIELD(getOutputTypeCount, GetOutputTypeCount);
LMINF_SAME_FIELD(kernelCompute, KernelCompute);
LMINF_SAME_FIELD(kernelDestroy, KernelDestroy);
LMINF_SAME_FIELD(getInputCharacteristic, GetInputCharacteristic);
LMINF_SAME_FIELD(getOutputCharacteristic, GetOutputCharacteristic);
LMINF_SAME_FIELD(getInputMemoryType, GetInputMemoryType);
LMINF_SAME_FIELD(getVariadicInputMinArity, GetVariadicInputMinArity);
LMINF_SAME_FIELD(getVariadicInputHomogeneity, GetVariadicInputHomogeneity);
LMINF_SAME_FIELD(getVariadicOutputMinArity, GetVariadicOutputMinArity);
LMINF_SAME_FIELD(getVariadicOutputHomogeneity, GetVariadicOutputHomogeneity);
LMINF_SAME_FIELD(createKernelV2, CreateKernelV2);
LMINF_SAME_FIELD(kernelComputeV2, KernelComputeV2);
LMINF_SAME_FIELD(inferOutputShape, InferOutputShapeFn);
LMINF_SAME_FIELD(getStartVersion, GetStartVersion);
LMINF_SAME_FIELD(getEndVersion, GetEndVersion);

#define LMINF_SAME_NUMBER(ours, theirs) \
  static_assert(static_cast<int>(abi::ours) == static_cast<int>(theirs))
LMINF_SAME_NUMBER(kFail, ORT_FAIL);
LMINF_SAME_NUMBER(kInvalidArgument, ORT_INVALID_ARGUMENT);
LMINF_SAME_NUMBER(kFloat, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
LMINF_SAME_NUMBER(kUint8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
LMINF_SAME_NUMBER(kInt8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
LMINF_SAME_NUMBER(kInt64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
LMINF_SAME_NUMBER(kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
LMINF_SAME_NUMBER(kBFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
LMINF_SAME_NUMBER(kRequired, INPUT_OUTPUT_REQUIRED);
LMINF_SAME_NUMBER(kOptional, INPUT_OUTPUT_OPTIONAL);
LMINF_SAME_NUMBER(kMemoryCpuInput, OrtMemTypeCPUInput);
LMINF_SAME_NUMBER(kLogWarning, ORT_LOGGING_LEVEL_WARNING);
LMINF_SAME_NUMBER(kDeviceAllocator, OrtDeviceAllocator);
LMINF_SAME_NUMBER(kMemoryDefault, OrtMemTypeDefault);
static_assert(offsetof(abi::ApiBase, getApi) == offsetof(OrtApiBase, GetApi));
static_assert(offsetof(abi::ApiBase, getVersionString) == offsetof(OrtApiBase, GetVersionString));
