// The part of onnxruntime's stable C ABI this library uses, declared by ourselves.
//
// onnxruntime's headers come in no Python wheel, so requiring them would mean that only people
// who fetch its release archive can build. The ABI is stable by promise: entries of OrtApi keep
// their place for ever and new ones are only appended. Where the real header is at hand
// (CMake: -DONNXRUNTIME_INCLUDE_DIR=…) ort_abi_check.cc holds every line here to it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define LMINF_ORT_CALL __stdcall
#define LMINF_ORT_EXPORT __declspec(dllexport)
#else
#define LMINF_ORT_CALL
#define LMINF_ORT_EXPORT __attribute__((visibility("default")))
#endif

namespace lminf::abi {

// The oldest version that has all entries below (KernelContext_ParallelFor came with 1.17).
constexpr uint32_t kApiVersion = 17;

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;
struct Env;
struct MemoryInfo;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int {
  kUndefined = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt64 = 7,
  kFloat16 = 10,
  kBFloat16 = 16,
};
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum LogLevel : int { kLogWarning = 2 };
enum AllocatorType : int { kDeviceAllocator = 0 };
enum MemoryType : int { kMemoryCpuInput = -2, kMemoryDefault = 0 };

// OrtApi is one long table of function pointers.
struct Api {
  void* entry[1];
};

struct ApiBase {
  const Api*(LMINF_ORT_CALL* getApi)(uint32_t version);
  const char*(LMINF_ORT_CALL* getVersionString)();
};

enum Entry : size_t {
  kCreateStatus = 0,
  kCreateEnv = 3,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kCreateCpuMemoryInfo = 69,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorTypeAndShapeInfo = 99,
  kReleaseCustomOpDomain = 101,
  kRegisterAllocator = 176,
  kKernelContextGetGpuComputeStream = 193,
  kKernelInfoGetConstantInput = 249,
  kKernelContextParallelFor = 274,
};

using ParallelBody = void (*)(void* data, size_t index);

// One signature per entry; `Call<kEntry>` is its type.
template <Entry>
struct Signature;
#define LMINF_SIGNATURE(entry, result, ...)                     \
  template <>                                                   \
  struct Signature<entry> {                                     \
    using Type = result(LMINF_ORT_CALL*)(__VA_ARGS__) noexcept; \
  }
LMINF_SIGNATURE(kCreateStatus, Status*, ErrorCode, const char*);
LMINF_SIGNATURE(kCreateEnv, Status*, LogLevel, const char*, Env**);
LMINF_SIGNATURE(kCreateCpuMemoryInfo, Status*, AllocatorType, MemoryType, MemoryInfo**);
LMINF_SIGNATURE(kRegisterAllocator, Status*, Env*, struct Allocator*);
LMINF_SIGNATURE(kCreateCustomOpDomain, Status*, const char*, CustomOpDomain**);
LMINF_SIGNATURE(kCustomOpDomainAdd, Status*, CustomOpDomain*, const struct CustomOp*);
LMINF_SIGNATURE(kAddCustomOpDomain, Status*, SessionOptions*, CustomOpDomain*);
LMINF_SIGNATURE(kGetTensorMutableData, Status*, Value*, void**);
LMINF_SIGNATURE(kGetTensorElementType, Status*, const TensorInfo*, ElementType*);
LMINF_SIGNATURE(kGetDimensionsCount, Status*, const TensorInfo*, size_t*);
LMINF_SIGNATURE(kGetDimensions, Status*, const TensorInfo*, int64_t*, size_t);
LMINF_SIGNATURE(kGetTensorTypeAndShape, Status*, const Value*, TensorInfo**);
LMINF_SIGNATURE(kKernelInfoGetAttributeFloat, Status*, const KernelInfo*, const char*, float*);
LMINF_SIGNATURE(kKernelInfoGetAttributeInt64, Status*, const KernelInfo*, const char*, int64_t*);
LMINF_SIGNATURE(kKernelContextGetInput, Status*, const KernelContext*, size_t, const Value**);
LMINF_SIGNATURE(kKernelContextGetOutput, Status*, KernelContext*, size_t, const int64_t*, size_t,
                Value**);
LMINF_SIGNATURE(kReleaseStatus, void, Status*);
LMINF_SIGNATURE(kReleaseTensorTypeAndShapeInfo, void, TensorInfo*);
LMINF_SIGNATURE(kReleaseCustomOpDomain, void, CustomOpDomain*);
LMINF_SIGNATURE(kKernelContextGetGpuComputeStream, Status*, const KernelContext*, void**);
LMINF_SIGNATURE(kKernelInfoGetConstantInput, Status*, const KernelInfo*, size_t, int*,
                const Value**);
LMINF_SIGNATURE(kKernelContextParallelFor, Status*, const KernelContext*, ParallelBody, size_t,
                size_t, void*);
#undef LMINF_SIGNATURE

template <Entry entry, typename... Arguments>
auto call(const Api* api, Arguments... arguments) {
  return reinterpret_cast<typename Signature<entry>::Type>(api->entry[entry])(arguments...);
}

// OrtAllocator as of version 18, the first with `reserve`.
constexpr uint32_t kAllocatorVersion = 18;
struct Allocator {
  uint32_t version;
  void*(LMINF_ORT_CALL* alloc)(Allocator*, size_t);
  void(LMINF_ORT_CALL* free)(Allocator*, void*);
  const MemoryInfo*(LMINF_ORT_CALL* info)(const Allocator*);
  void*(LMINF_ORT_CALL* reserve)(Allocator*, size_t);
};

// OrtCustomOp as of version 17: what onnxruntime asks about an operator.
struct CustomOp {
  uint32_t version;
  void*(LMINF_ORT_CALL* createKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char*(LMINF_ORT_CALL* getName)(const CustomOp*);
  const char*(LMINF_ORT_CALL* getExecutionProviderType)(const CustomOp*);
  ElementType(LMINF_ORT_CALL* getInputType)(const CustomOp*, size_t);
  size_t(LMINF_ORT_CALL* getInputTypeCount)(const CustomOp*);
  ElementType(LMINF_ORT_CALL* getOutputType)(const CustomOp*, size_t);
  size_t(LMINF_ORT_CALL* getOutputTypeCount)(const CustomOp*);
  void(LMINF_ORT_CALL* kernelCompute)(void*, KernelContext*);
  void(LMINF_ORT_CALL* kernelDestroy)(void*);
  Characteristic(LMINF_ORT_CALL* getInputCharacteristic)(const CustomOp*, size_t);
  Characteristic(LMINF_ORT_CALL* getOutputCharacteristic)(const CustomOp*, size_t);
  MemoryType(LMINF_ORT_CALL* getInputMemoryType)(const CustomOp*, size_t);
  int(LMINF_ORT_CALL* getVariadicInputMinArity)(const CustomOp*);
  int(LMINF_ORT_CALL* getVariadicInputHomogeneity)(const CustomOp*);
  int(LMINF_ORT_CALL* getVariadicOutputMinArity)(const CustomOp*);
  int(LMINF_ORT_CALL* getVariadicOutputHomogeneity)(const CustomOp*);
  Status*(LMINF_ORT_CALL* createKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status*(LMINF_ORT_CALL* kernelComputeV2)(void*, KernelContext*);
  Status*(LMINF_ORT_CALL* inferOutputShape)(const CustomOp*, void*);
  int(LMINF_ORT_CALL* getStartVersion)(const CustomOp*);
  int(LMINF_ORT_CALL* getEndVersion)(const CustomOp*);
};

}  // namespace lminf::abi
