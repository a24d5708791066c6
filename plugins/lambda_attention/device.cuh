// The device instructions the kernels use, one function each.
//
// Built by nvcc these are PTX; built by a C++ compiler they come from the block emulation of
// plugins/emulation, so that the same kernels run in tests without a GPU.
#pragma once

#include "arithmetic.h"

#if defined(LMINF_EMULATE)
#include "emulation.h"
#else
#include "device_ptx.cuh"
#endif

namespace lminf {

// The first code whose waitForPrevious waits.
constexpr int kWaitingCode = 90;

// Enqueues kernel(arguments); early only if its own code waits for the kernel ahead of it.
template <class Arguments>
cudaError_t enqueue(void (*kernel)(Arguments), LaunchShape shape, cudaStream_t stream,
                    const Arguments& arguments) {
  if (shape.early) {
    int version = 0;
    const cudaError_t status = readCodeVersion(kernel, version);
    if (status != cudaSuccess) return status;
    shape.early = version >= kWaitingCode;
  }
  return launchKernel(kernel, shape, stream, arguments);
}

// `count` elements of a 16-bit type in registers, two to a register.
template <int count>
struct Packed {
  std::uint32_t word[count / 2];
};

// Loads count = 2, 4 or 8 contiguous 16-bit elements, aligned to their size.
template <int count>
__device__ __forceinline__ Packed<count> loadStreamed(const void* source) {
  Packed<count> loaded;
  if constexpr (count == 8) {
    loadGlobal16(loaded.word, source);
  } else if constexpr (count == 4) {
    loadGlobal8(loaded.word, source);
  } else {
    loadGlobal4(loaded.word, source);
  }
  return loaded;
}

// Loads count = 2, 4 or 8 contiguous bytes, aligned to their size, to the first registers.
template <int count>
__device__ __forceinline__ Packed<count> loadStreamedBytes(const void* source) {
  Packed<count> loaded{};
  std::uint32_t bytes[count == 8 ? 2 : 1];
  if constexpr (count == 8) {
    loadGlobal8(bytes, source);
    loaded.word[1] = bytes[1];
  } else if constexpr (count == 4) {
    loadGlobal4(bytes, source);
  } else {
    loadGlobal2(bytes, source);
  }
  loaded.word[0] = bytes[0];
  return loaded;
}

template <int words>
struct alignas(4 * words) Words {
  std::uint32_t word[words];
};

// Reads words from shared memory in one access; the address is aligned to their size.
template <int words>
__device__ __forceinline__ void loadShared(std::uint32_t (&word)[words], const void* source) {
  const Words<words> access = *static_cast<const Words<words>*>(source);
  for (int index = 0; index < words; ++index) word[index] = access.word[index];
}

// Writes words in one access; the address is aligned to their size.
template <int words>
__device__ __forceinline__ void storeWords(void* target, const Words<words>& source) {
  *static_cast<Words<words>*>(target) = source;
}

template <class T>
__device__ __forceinline__ float toFloat(T value);
template <>
__device__ __forceinline__ float toFloat(float value) {
  return value;
}
template <>
__device__ __forceinline__ float toFloat(Half value) {
  return halfToFloat(value.bits);
}
template <>
__device__ __forceinline__ float toFloat(Bfloat16 value) {
  return bitsToFloat(static_cast<std::uint32_t>(value.bits) << 16);
}

template <class T>
__device__ __forceinline__ T fromFloat(float value);
template <>
__device__ __forceinline__ float fromFloat(float value) {
  return value;
}
template <>
__device__ __forceinline__ Half fromFloat(float value) {
  return {floatToHalf(value)};
}
template <>
__device__ __forceinline__ Bfloat16 fromFloat(float value) {
  return {floatToBfloat16(value)};
}

// A pair of one warp's maximum over lanes that differ in the given lane bits.
__device__ __forceinline__ float maximumOver(float value, int firstMask, int lastMask) {
  for (int mask = firstMask; mask <= lastMask; mask <<= 1) {
    value = fmaxf(value, shuffleXor(value, mask));
  }
  return value;
}

__device__ __forceinline__ float sumOver(float value, int firstMask, int lastMask) {
  for (int mask = firstMask; mask <= lastMask; mask <<= 1) {
    value += shuffleXor(value, mask);
  }
  return value;
}

}  // namespace lminf
