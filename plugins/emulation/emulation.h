// One block of CUDA threads on a CPU: every instruction of device_ptx.cuh, done by a fiber per
// thread.
//
// Warp instructions meet in a rendezvous of 32 lanes, with the fragment layouts of the PTX manual
// (sections on mma.m16n8k16, ldmatrix, movmatrix). A warp runs as far as it can before the next one
// starts, so a missing block barrier shows. Asynchronous copies arrive only when they are waited
// for, shared memory starts as NaN, so a missing wait shows too. Lanes that meet in different
// instructions, and barriers that not all threads reach, end the program with a message.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda_runtime_api.h"
#include "device_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace lminf {
namespace emulation {

struct Index {
  unsigned x, y, z;
};
extern Index threadIndex;
extern Index blockIndex;

// What kernels asked of memory since the last reset, in bytes; one launch counts one.
struct Counters {
  std::uint64_t launches;
  std::uint64_t earlyLaunches;  // of kernels that may start before the one ahead of them ends
  std::uint64_t streamedBytes;  // loadGlobal2, 4, 8, 16
  std::uint64_t copiedBytes;    // copyAsync4, 16
};
extern Counters counters;

enum class WarpInstruction {
  kShuffle,
  kMultiplyHalf,
  kMultiplyBfloat16,
  kLoad,
  kLoadTransposed,
  kTranspose,
  kSync,
  kWaitProducts
};

struct LaneInput {
  std::uint32_t word[8];  // mma: a0 ... a3, b0, b1; movmatrix, shuffle: word 0; shuffle: mask in 1
                          // wait for products: groups that may be pending in 0
  float sum[4];           // mma
  const void* address;    // ldmatrix
};

struct LaneOutput {
  std::uint32_t word[4];
  float sum[4];
};

// Waits for all lanes of the warp; the last one carries the instruction out for all.
LaneOutput meetWarp(WarpInstruction instruction, const LaneInput& input);
void meetBlock();

unsigned char* blockShared();
void copyLater(void* shared, const void* global, std::size_t bytes);
void commitGroup();
void waitGroups(int pending);

float floatOfHalf(std::uint16_t bits);
std::uint16_t halfOfFloat(float value);
std::uint16_t bfloat16OfFloat(float value);

using Thread = void (*)(const void* context);

// Runs every block of a grid, one after the other.
cudaError_t runGrid(unsigned gridX, unsigned gridY, unsigned threads, std::size_t sharedBytes,
                    bool early, Thread thread, const void* context);

// A kernel that starts early must wait in every thread, and before the thread loads keys or values.
void waitForPrevious();
void requireWaited();
int codeVersion();

// Loads of `bytes` at an address that is not aligned to them end the program, as on a device.
const void* aligned(const void* address, std::size_t bytes);

}  // namespace emulation

inline unsigned char* dynamicShared() { return emulation::blockShared(); }

inline float bitsToFloat(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float halfToFloat(std::uint16_t bits) { return emulation::floatOfHalf(bits); }
inline std::uint16_t floatToHalf(float value) { return emulation::halfOfFloat(value); }
inline std::uint16_t floatToBfloat16(float value) { return emulation::bfloat16OfFloat(value); }

template <class T>
std::uint32_t packPair(float low, float high);
template <>
inline std::uint32_t packPair<Half>(float low, float high) {
  return floatToHalf(low) | static_cast<std::uint32_t>(floatToHalf(high)) << 16;
}
template <>
inline std::uint32_t packPair<Bfloat16>(float low, float high) {
  return floatToBfloat16(low) | static_cast<std::uint32_t>(floatToBfloat16(high)) << 16;
}

inline float exp2Fast(float value) { return std::exp2(value); }
inline float divideFast(float dividend, float divisor) { return dividend / divisor; }

inline std::uint32_t packLow(std::uint32_t a, std::uint32_t b) { return (a & 0xffffu) | b << 16; }
inline std::uint32_t packHigh(std::uint32_t a, std::uint32_t b) {
  return a >> 16 | (b & 0xffff0000u);
}

template <int words>
void loadGlobal(std::uint32_t (&word)[words], const void* source) {
  emulation::requireWaited();
  std::memcpy(word, emulation::aligned(source, sizeof(word)), sizeof(word));
  emulation::counters.streamedBytes += sizeof(word);
}
inline void loadGlobal16(std::uint32_t (&word)[4], const void* source) { loadGlobal(word, source); }
inline void loadGlobal8(std::uint32_t (&word)[2], const void* source) { loadGlobal(word, source); }
inline void loadGlobal4(std::uint32_t (&word)[1], const void* source) { loadGlobal(word, source); }
inline void loadGlobal2(std::uint32_t (&word)[1], const void* source) {
  word[0] = 0;
  std::memcpy(word, emulation::aligned(source, 2), 2);
  emulation::counters.streamedBytes += 2;
}

inline std::uint32_t selectBytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(b) << 32 | a;
  std::uint32_t word = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const std::uint32_t from = selector >> 4 * byte & 7u;
    word |= static_cast<std::uint32_t>(bytes >> 8 * from & 0xffu) << 8 * byte;
  }
  return word;
}
inline std::uint32_t subtractHalves(std::uint32_t a, std::uint32_t b) {
  const auto half = [&](int shift) -> std::uint32_t {
    const float left = emulation::floatOfHalf(static_cast<std::uint16_t>(a >> shift));
    return emulation::halfOfFloat(left -
                                  emulation::floatOfHalf(static_cast<std::uint16_t>(b >> shift)));
  };
  return half(0) | half(16) << 16;
}

inline void copyAsync16(void* shared, const void* global) {
  emulation::copyLater(shared, global, 16);
}
inline void copyAsync4(void* shared, const void* global) {
  emulation::copyLater(shared, global, 4);
}
inline void commitCopies() { emulation::commitGroup(); }
template <int pending>
void waitCopies() {
  emulation::waitGroups(pending);
}

inline void loadMatrices(std::uint32_t (&word)[4], const void* row) {
  emulation::LaneInput input{};
  input.address = emulation::aligned(row, 16);
  const auto output = emulation::meetWarp(emulation::WarpInstruction::kLoad, input);
  std::memcpy(word, output.word, sizeof(word));
}
inline void loadMatricesTransposed(std::uint32_t (&word)[4], const void* row) {
  emulation::LaneInput input{};
  input.address = emulation::aligned(row, 16);
  const auto output = emulation::meetWarp(emulation::WarpInstruction::kLoadTransposed, input);
  std::memcpy(word, output.word, sizeof(word));
}

inline std::uint32_t transposeMatrix(std::uint32_t word) {
  emulation::LaneInput input{};
  input.word[0] = word;
  return emulation::meetWarp(emulation::WarpInstruction::kTranspose, input).word[0];
}

template <class T>
void multiplyAdd(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  emulation::LaneInput input{};
  std::memcpy(input.word, a, sizeof(a));
  input.word[4] = b0;
  input.word[5] = b1;
  std::memcpy(input.sum, sum, sizeof(sum));
  constexpr bool isHalf = sizeof(T) == 2 && __is_same(T, Half);
  const auto output = emulation::meetWarp(isHalf ? emulation::WarpInstruction::kMultiplyHalf
                                                 : emulation::WarpInstruction::kMultiplyBfloat16,
                                          input);
  std::memcpy(sum, output.sum, sizeof(sum));
}

inline int shuffleXor(int value, int mask) {
  emulation::LaneInput input{};
  input.word[0] = static_cast<std::uint32_t>(value);
  input.word[1] = static_cast<std::uint32_t>(mask);
  return static_cast<int>(emulation::meetWarp(emulation::WarpInstruction::kShuffle, input).word[0]);
}
inline float shuffleXor(float value, int mask) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bitsToFloat(static_cast<std::uint32_t>(shuffleXor(static_cast<int>(bits), mask)));
}

// A kernel has ended before the next one starts; that the next one waits is required all the same.
inline void waitForPrevious() { emulation::waitForPrevious(); }
inline void letNextStart() {}

// Blocks run one after the other.
inline bool arriveLast(std::uint32_t* counter, int count) {
  const auto last = static_cast<std::uint32_t>(count - 1);
  const std::uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before == last;
}

inline void syncBlock() { emulation::meetBlock(); }
inline int threadAnew() { return static_cast<int>(emulation::threadIndex.x); }
inline void syncWarp() { emulation::meetWarp(emulation::WarpInstruction::kSync, {}); }

struct LaunchShape {
  unsigned gridX;
  unsigned gridY;
  unsigned threads;
  std::size_t sharedBytes;
  bool early = false;
};

template <class Arguments>
cudaError_t readCodeVersion(void (*)(Arguments), int& version) {
  version = emulation::codeVersion();
  return cudaSuccess;
}

template <class Arguments>
cudaError_t launchKernel(void (*kernel)(Arguments), const LaunchShape& shape, cudaStream_t,
                         const Arguments& arguments) {
  struct Call {
    void (*kernel)(Arguments);
    const Arguments* arguments;
  };
  const Call call{kernel, &arguments};
  return emulation::runGrid(
      shape.gridX, shape.gridY, shape.threads, shape.sharedBytes, shape.early,
      [](const void* context) {
        const Call& made = *static_cast<const Call*>(context);
        made.kernel(*made.arguments);
      },
      &call);
}

}  // namespace lminf

#define threadIdx (::lminf::emulation::threadIndex)
#define blockIdx (::lminf::emulation::blockIndex)
