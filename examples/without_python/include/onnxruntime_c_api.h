// The part of onnxruntime's C API that generate.cc uses, for machines without the official header.
//
// The Python wheel brings libonnxruntime and no header. The API is a table of functions whose
// entries keep their place for ever, so a declaration of a few of them by their places fits every
// release from 1.17 on. With the official header in the compiler's path this file is not needed:
// Debian's libonnxruntime-dev, the release archives and the NuGet package have it. A test holds
// this file to it where it is at hand.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define ORT_API_VERSION 17

#if defined(_WIN32)
#define ORT_API_CALL __stdcall
#define ORTCHAR_T wchar_t
#else
#define ORT_API_CALL
#define ORTCHAR_T char
#endif

typedef struct OrtAllocator OrtAllocator;
typedef struct OrtEnv OrtEnv;
typedef struct OrtIoBinding OrtIoBinding;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtModelMetadata OrtModelMetadata;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtStatus OrtStatus;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtTypeInfo OrtTypeInfo;
typedef struct OrtValue OrtValue;

typedef enum OrtLoggingLevel { ORT_LOGGING_LEVEL_WARNING = 2 } OrtLoggingLevel;
typedef enum OrtAllocatorType { OrtArenaAllocator = 1 } OrtAllocatorType;
typedef enum OrtMemType { OrtMemTypeDefault = 0 } OrtMemType;
typedef enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
} ONNXTensorElementDataType;

// Entries FIRST … LAST of the table, which are not used here.
#define ORT_UNUSED(FIRST, LAST) void* unused_##FIRST[LAST - FIRST + 1]
#define ORT_ENTRY(RESULT, NAME, ...) RESULT(ORT_API_CALL* NAME)(__VA_ARGS__)
#define ORT_STATUS_ENTRY(NAME, ...) ORT_ENTRY(OrtStatus*, NAME, __VA_ARGS__)

typedef struct OrtApi {
  ORT_UNUSED(0, 1);
  ORT_ENTRY(const char*, GetErrorMessage, const OrtStatus*);
  ORT_STATUS_ENTRY(CreateEnv, OrtLoggingLevel, const char*, OrtEnv**);
  ORT_UNUSED(4, 6);
  ORT_STATUS_ENTRY(CreateSession, const OrtEnv*, const ORTCHAR_T*, const OrtSessionOptions*,
                   OrtSession**);
  ORT_UNUSED(8, 9);
  ORT_STATUS_ENTRY(CreateSessionOptions, OrtSessionOptions**);
  ORT_UNUSED(11, 29);
  ORT_STATUS_ENTRY(SessionGetInputCount, const OrtSession*, size_t*);
  ORT_UNUSED(31, 32);
  ORT_STATUS_ENTRY(SessionGetInputTypeInfo, const OrtSession*, size_t, OrtTypeInfo**);
  ORT_STATUS_ENTRY(SessionGetOutputTypeInfo, const OrtSession*, size_t, OrtTypeInfo**);
  ORT_UNUSED(35, 35);
  ORT_STATUS_ENTRY(SessionGetInputName, const OrtSession*, size_t, OrtAllocator*, char**);
  ORT_UNUSED(37, 48);
  ORT_STATUS_ENTRY(CreateTensorWithDataAsOrtValue, const OrtMemoryInfo*, void*, size_t,
                   const int64_t*, size_t, ONNXTensorElementDataType, OrtValue**);
  ORT_UNUSED(50, 54);
  ORT_STATUS_ENTRY(CastTypeInfoToTensorInfo, const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**);
  ORT_UNUSED(56, 59);
  ORT_STATUS_ENTRY(GetTensorElementType, const OrtTensorTypeAndShapeInfo*,
                   ONNXTensorElementDataType*);
  ORT_STATUS_ENTRY(GetDimensionsCount, const OrtTensorTypeAndShapeInfo*, size_t*);
  ORT_STATUS_ENTRY(GetDimensions, const OrtTensorTypeAndShapeInfo*, int64_t*, size_t);
  ORT_UNUSED(63, 68);
  ORT_STATUS_ENTRY(CreateCpuMemoryInfo, OrtAllocatorType, OrtMemType, OrtMemoryInfo**);
  ORT_UNUSED(70, 75);
  ORT_STATUS_ENTRY(AllocatorFree, OrtAllocator*, void*);
  ORT_UNUSED(77, 77);
  ORT_STATUS_ENTRY(GetAllocatorWithDefaultOptions, OrtAllocator**);
  ORT_UNUSED(79, 91);
  ORT_ENTRY(void, ReleaseEnv, OrtEnv*);
  ORT_ENTRY(void, ReleaseStatus, OrtStatus*);
  ORT_ENTRY(void, ReleaseMemoryInfo, OrtMemoryInfo*);
  ORT_ENTRY(void, ReleaseSession, OrtSession*);
  ORT_ENTRY(void, ReleaseValue, OrtValue*);
  ORT_UNUSED(97, 97);
  ORT_ENTRY(void, ReleaseTypeInfo, OrtTypeInfo*);
  ORT_UNUSED(99, 99);
  ORT_ENTRY(void, ReleaseSessionOptions, OrtSessionOptions*);
  ORT_UNUSED(101, 110);
  ORT_STATUS_ENTRY(SessionGetModelMetadata, const OrtSession*, OrtModelMetadata**);
  ORT_UNUSED(112, 115);
  ORT_STATUS_ENTRY(ModelMetadataLookupCustomMetadataMap, const OrtModelMetadata*, OrtAllocator*,
                   const char*, char**);
  ORT_UNUSED(117, 117);
  ORT_ENTRY(void, ReleaseModelMetadata, OrtModelMetadata*);
  ORT_UNUSED(119, 132);
  ORT_STATUS_ENTRY(RunWithBinding, OrtSession*, const OrtRunOptions*, const OrtIoBinding*);
  ORT_STATUS_ENTRY(CreateIoBinding, OrtSession*, OrtIoBinding**);
  ORT_ENTRY(void, ReleaseIoBinding, OrtIoBinding*);
  ORT_STATUS_ENTRY(BindInput, OrtIoBinding*, const char*, const OrtValue*);
  ORT_STATUS_ENTRY(BindOutput, OrtIoBinding*, const char*, const OrtValue*);
  ORT_UNUSED(138, 227);
  ORT_STATUS_ENTRY(RegisterCustomOpsLibrary_V2, OrtSessionOptions*, const ORTCHAR_T*);
} OrtApi;

typedef struct OrtApiBase {
  ORT_ENTRY(const OrtApi*, GetApi, uint32_t);
  ORT_ENTRY(const char*, GetVersionString, void);
} OrtApiBase;

#undef ORT_UNUSED
#undef ORT_ENTRY
#undef ORT_STATUS_ENTRY

#ifdef __cplusplus
extern "C"
#endif
    const OrtApiBase* ORT_API_CALL OrtGetApiBase(void);
