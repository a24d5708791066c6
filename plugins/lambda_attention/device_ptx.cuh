// The device instructions as PTX, for compute capability 8.0 and later.
#pragma once

#include <cuda_runtime.h>

#include "device_types.h"

namespace lminf {

__device__ __forceinline__ unsigned char* dynamicShared() {
  extern __shared__ __align__(128) unsigned char lminfShared[];
  return lminfShared;
}

__device__ __forceinline__ float bitsToFloat(std::uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float halfToFloat(std::uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ std::uint16_t floatToHalf(float value) {
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ std::uint16_t floatToBfloat16(float value) {
  std::uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Two floats to one register of 16-bit elements, `low` in the low half.
template <class T>
__device__ __forceinline__ std::uint32_t packPair(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t packPair<Half>(float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
__device__ __forceinline__ std::uint32_t packPair<Bfloat16>(float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ float exp2Fast(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// To two units in the last place; 0 for divisors above 2^126.
__device__ __forceinline__ float divideFast(float dividend, float divisor) {
  return __fdividef(dividend, divisor);
}

// The low halves of two registers, and their high halves.
__device__ __forceinline__ std::uint32_t packLow(std::uint32_t a, std::uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ __forceinline__ std::uint32_t packHigh(std::uint32_t a, std::uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}

// Four bytes of a register pair: nibble i of the selector says which byte of b:a becomes byte i.
__device__ __forceinline__ std::uint32_t selectBytes(std::uint32_t a, std::uint32_t b,
                                                     std::uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// a - b of two float16 in each register.
__device__ __forceinline__ std::uint32_t subtractHalves(std::uint32_t a, std::uint32_t b) {
  std::uint32_t word;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}

// Keys and values are read once per block: they pass by the first-level cache. Volatile keeps the
// loads where the kernel issues them, ahead of the work that hides their latency.
__device__ __forceinline__ void loadGlobal16(std::uint32_t (&word)[4], const void* source) {
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "l"(source));
}
__device__ __forceinline__ void loadGlobal8(std::uint32_t (&word)[2], const void* source) {
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(word[0]), "=r"(word[1])
               : "l"(source));
}
__device__ __forceinline__ void loadGlobal4(std::uint32_t (&word)[1], const void* source) {
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(word[0]) : "l"(source));
}
__device__ __forceinline__ void loadGlobal2(std::uint32_t (&word)[1], const void* source) {
  std::uint16_t half;
  asm volatile("ld.global.L1::no_allocate.u16 %0, [%1];" : "=h"(half) : "l"(source));
  word[0] = half;
}

__device__ __forceinline__ std::uint32_t sharedAddress(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void copyAsync16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(sharedAddress(shared)), "l"(global)
               : "memory");
}
__device__ __forceinline__ void copyAsync4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(sharedAddress(shared)), "l"(global)
               : "memory");
}
__device__ __forceinline__ void commitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `pending` of this thread's latest groups are still on their way.
template <int pending>
__device__ __forceinline__ void waitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void loadMatrices(std::uint32_t (&word)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(sharedAddress(row))
               : "memory");
}
__device__ __forceinline__ void loadMatricesTransposed(std::uint32_t (&word)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(sharedAddress(row))
               : "memory");
}

// The transpose of an 8x8 matrix of 16-bit elements spread over the warp.
__device__ __forceinline__ std::uint32_t transposeMatrix(std::uint32_t word) {
  std::uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
  return result;
}

// sum += a * b of a 16x16 and a 16x8 matrix; fragments as PTX defines them for m16n8k16.
template <class T>
__device__ __forceinline__ void multiplyAdd(float (&sum)[4], const std::uint32_t (&a)[4],
                                            std::uint32_t b0, std::uint32_t b1);
template <>
__device__ __forceinline__ void multiplyAdd<Half>(float (&sum)[4], const std::uint32_t (&a)[4],
                                                  std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiplyAdd<Bfloat16>(float (&sum)[4], const std::uint32_t (&a)[4],
                                                      std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float shuffleXor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ int shuffleXor(int value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// A kernel enqueued with `early` may start before the one ahead of it has ended: it waits here for
// that one's end, and everything before it. Elsewhere both do nothing, and so they do in code that
// was compiled for an older device than it runs on (kWaitingCode).
__device__ __forceinline__ void waitForPrevious() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may start once every block has come here.
__device__ __forceinline__ void letNextStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Counts to `count` from 0 and on at 0 again; says who came last. What blocks wrote ahead of a
// barrier before their arrivals, the last one sees behind a barrier after its own.
__device__ __forceinline__ bool arriveLast(std::uint32_t* counter, int count) {
  const auto last = static_cast<std::uint32_t>(count - 1);
  std::uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(last)
               : "memory");
  return before == last;
}

// threadIdx.x, read anew: what follows from it is computed again and holds no register meanwhile.
__device__ __forceinline__ int threadAnew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ __forceinline__ void syncBlock() { __syncthreads(); }
__device__ __forceinline__ void syncWarp() { __syncwarp(); }

struct LaunchShape {
  unsigned gridX;
  unsigned gridY;
  unsigned threads;
  std::size_t sharedBytes;
  bool early = false;  // the kernel waits for the previous one itself (waitForPrevious)
};

// The device for which the code of a kernel that runs here was compiled: 10 major + minor. Where a
// library has no machine code for this one, the driver makes it from PTX of an older one.
template <class Arguments>
cudaError_t readCodeVersion(void (*kernel)(Arguments), int& version) {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) cudaGetLastError();
  version = attributes.ptxVersion;
  return status;
}

// More than 48 KiB of shared memory has to be asked for. An error that somebody's earlier call left
// behind is neither reported nor cleared; one of this launch is returned and not left behind.
template <class Arguments>
cudaError_t launchKernel(void (*kernel)(Arguments), const LaunchShape& shape, cudaStream_t stream,
                         const Arguments& arguments) {
  if (shape.sharedBytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.sharedBytes));
    if (status != cudaSuccess) {
      cudaGetLastError();
      return status;
    }
  }
  void* parameters[] = {const_cast<Arguments*>(&arguments)};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(shape.gridX, shape.gridY);
  launch.blockDim = dim3(shape.threads);
  launch.dynamicSmemBytes = shape.sharedBytes;
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = shape.early ? 1 : 0;
  const cudaError_t status =
      cudaLaunchKernelExC(&launch, reinterpret_cast<const void*>(kernel), parameters);
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

}  // namespace lminf
