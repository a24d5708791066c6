// What compute capability 9.0 has beyond device_ptx.cuh: products of a warpgroup, barriers that
// count arrivals, registers that change hands. Needs code for sm_90a.
#pragma once

#include "device.cuh"

namespace lminf {

// Products. A warpgroup is four warps, the first of a number divisible by 4; warp i holds rows
// 16 i ... 16 i + 15 of a sum, columns as in the accumulator of m16n8: element 4 tile + e of a lane
// is what element e of column tile `tile` is there. Operands are read and sums are written some
// time between the product and the wait for its group.

// Between writes of registers and the products that read them.
__device__ __forceinline__ void fenceProducts() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Keeps the compiler from moving uses of these registers across, in either direction.
template <int count>
__device__ __forceinline__ void pinRegisters(float (&values)[count]) {
#pragma unroll
  for (int index = 0; index < count; ++index) asm volatile("" : "+f"(values[index])::"memory");
}
template <int count>
__device__ __forceinline__ void pinRegisters(std::uint32_t (&values)[count]) {
#pragma unroll
  for (int index = 0; index < count; ++index) asm volatile("" : "+r"(values[index])::"memory");
}
// Keeps the assembler from moving a wait ahead of the work that makes a number, which is never
// negative: nothing sleeps, but no wait passes what might.
__device__ __forceinline__ void finishBefore(float number) {
  asm volatile("{.reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p nanosleep.u32 0;}" ::"f"(number)
               : "memory");
}
// Waits until at most `pending` of the latest groups are under way; what the others hold or read
// is named, so that it is used after the wait only.
template <int pending, class... Registers>
__device__ __forceinline__ void waitProducts(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
  (pinRegisters(registers), ...);
}

#define LMINF_NUMBERS_32                                         \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "          \
  "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31}, "
#define LMINF_NUMBERS_64                                         \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "          \
  "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
  "%60, %61, %62, %63}, "
#define LMINF_SUMS_32                                                                           \
  "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]),           \
      "+f"(sum[6]), "+f"(sum[7]), "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]),     \
      "+f"(sum[12]), "+f"(sum[13]), "+f"(sum[14]), "+f"(sum[15]), "+f"(sum[16]), "+f"(sum[17]), \
      "+f"(sum[18]), "+f"(sum[19]), "+f"(sum[20]), "+f"(sum[21]), "+f"(sum[22]), "+f"(sum[23]), \
      "+f"(sum[24]), "+f"(sum[25]), "+f"(sum[26]), "+f"(sum[27]), "+f"(sum[28]), "+f"(sum[29]), \
      "+f"(sum[30]), "+f"(sum[31])
#define LMINF_SUMS_64                                                                           \
  "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]),           \
      "+f"(sum[6]), "+f"(sum[7]), "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]),     \
      "+f"(sum[12]), "+f"(sum[13]), "+f"(sum[14]), "+f"(sum[15]), "+f"(sum[16]), "+f"(sum[17]), \
      "+f"(sum[18]), "+f"(sum[19]), "+f"(sum[20]), "+f"(sum[21]), "+f"(sum[22]), "+f"(sum[23]), \
      "+f"(sum[24]), "+f"(sum[25]), "+f"(sum[26]), "+f"(sum[27]), "+f"(sum[28]), "+f"(sum[29]), \
      "+f"(sum[30]), "+f"(sum[31]), "+f"(sum[32]), "+f"(sum[33]), "+f"(sum[34]), "+f"(sum[35]), \
      "+f"(sum[36]), "+f"(sum[37]), "+f"(sum[38]), "+f"(sum[39]), "+f"(sum[40]), "+f"(sum[41]), \
      "+f"(sum[42]), "+f"(sum[43]), "+f"(sum[44]), "+f"(sum[45]), "+f"(sum[46]), "+f"(sum[47]), \
      "+f"(sum[48]), "+f"(sum[49]), "+f"(sum[50]), "+f"(sum[51]), "+f"(sum[52]), "+f"(sum[53]), \
      "+f"(sum[54]), "+f"(sum[55]), "+f"(sum[56]), "+f"(sum[57]), "+f"(sum[58]), "+f"(sum[59]), \
      "+f"(sum[60]), "+f"(sum[61]), "+f"(sum[62]), "+f"(sum[63])

// sum = (accumulate ? sum : 0) + a b: 64 rows, 128 columns, 16 inner; both operands in shared
// memory, their inner index contiguous (hopper_matrix.h).
template <class T>
__device__ __forceinline__ void multiplyShared(float (&sum)[64], std::uint64_t a, std::uint64_t b,
                                               bool accumulate);
// sum += a b: `a` in registers as the fragments of m16n8k16, `b` in shared memory with its columns
// contiguous.
template <class T>
__device__ __forceinline__ void multiplyRegisters(float (&sum)[32], const std::uint32_t* a,
                                                  std::uint64_t b);
template <class T>
__device__ __forceinline__ void multiplyRegisters(float (&sum)[64], const std::uint32_t* a,
                                                  std::uint64_t b);

#define LMINF_MULTIPLY_SHARED(Type, type)                                                  \
  template <>                                                                              \
  __device__ __forceinline__ void multiplyShared<Type>(float (&sum)[64], std::uint64_t a,  \
                                                       std::uint64_t b, bool accumulate) { \
    asm volatile(                                                                          \
        "{.reg .pred p; setp.ne.b32 p, %66, 0; "                                           \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " LMINF_NUMBERS_64  \
        "%64, %65, p, 1, 1, 0, 0;}"                                                        \
        : LMINF_SUMS_64                                                                    \
        : "l"(a), "l"(b), "r"(static_cast<std::uint32_t>(accumulate))                      \
        : "memory");                                                                       \
  }
LMINF_MULTIPLY_SHARED(Half, "f16")
LMINF_MULTIPLY_SHARED(Bfloat16, "bf16")
#undef LMINF_MULTIPLY_SHARED

#define LMINF_MULTIPLY_REGISTERS(Type, type, count, columns, operands)                \
  template <>                                                                         \
  __device__ __forceinline__ void multiplyRegisters<Type>(                            \
      float (&sum)[count], const std::uint32_t* a, std::uint64_t b) {                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type \
                 " " LMINF_NUMBERS_##count operands ", 1, 1, 1, 1;"                   \
                 : LMINF_SUMS_##count                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                 \
                 : "memory");                                                         \
  }
LMINF_MULTIPLY_REGISTERS(Half, "f16", 32, "64", "{%32, %33, %34, %35}, %36")
LMINF_MULTIPLY_REGISTERS(Bfloat16, "bf16", 32, "64", "{%32, %33, %34, %35}, %36")
LMINF_MULTIPLY_REGISTERS(Half, "f16", 64, "128", "{%64, %65, %66, %67}, %68")
LMINF_MULTIPLY_REGISTERS(Bfloat16, "bf16", 64, "128", "{%64, %65, %66, %67}, %68")
#undef LMINF_MULTIPLY_REGISTERS
#undef LMINF_NUMBERS_32
#undef LMINF_NUMBERS_64
#undef LMINF_SUMS_32
#undef LMINF_SUMS_64

// Products read shared memory by another way than loads and stores do. Between the two: in the
// writer before a barrier, or in the reader behind it.
__device__ __forceinline__ void fenceShared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Writes 16 bytes of shared memory that products will read.
__device__ __forceinline__ void storeShared16(void* target, const Words<4>& words) {
  storeWords<4>(target, words);
}

// A barrier in shared memory whose phase ends with its last arrival. Phases have parities 0, 1, 0
// ...
using Barrier = std::uint64_t;

__device__ __forceinline__ void initBarrier(Barrier* barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(sharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void arriveAt(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sharedAddress(barrier)) : "memory");
}
// Arrives when all copies that this thread has started are there.
__device__ __forceinline__ void arriveWithCopies(Barrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(sharedAddress(barrier))
               : "memory");
}
// Waits until the phase of this parity has ended; true of parity 1 at the start.
__device__ __forceinline__ void waitAt(Barrier* barrier, std::uint32_t parity) {
  std::uint32_t done;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, "
        "p;}"
        : "=r"(done)
        : "r"(sharedAddress(barrier)), "r"(parity)
        : "memory");
  } while (done == 0);
}

// The numbered barriers of a block: waits for `threads` of them, or only counts as one's arrival.
__device__ __forceinline__ void syncNumbered(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void arriveNumbered(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// How many registers the warps of a warpgroup have from here on.
template <int registers>
__device__ __forceinline__ void takeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void giveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

}  // namespace lminf
