// The instructions of hopper_ptx.cuh on a CPU.
//
// Products read their operands and write their sums when their group is waited for; until then the
// sums are NaN. What shared memory held of the operands at the start must be there at the wait. A
// product needs a fence of registers since the last wait, and what it reads of shared memory a
// fence of shared memory since it was written, by the writer or by the reader. Who arrives at a
// barrier lets those go first who waited for it; copies that arrive at one do so when nothing else
// can go on, or at once where the device is eager.
#pragma once

#include "device.cuh"

namespace lminf {

using Barrier = std::uint64_t;

namespace emulation {

struct ProductSources {
  const std::uint32_t* registers;
  std::uint64_t a, b;
  bool columnsContiguous;
};

std::uint32_t sharedAddress(const void* shared);
void fenceProducts();
void fenceShared();
void noteStore(const void* target, std::size_t bytes);
void multiply(float* sum, int columns, const ProductSources& sources, bool accumulate, bool isHalf);
void commitProducts();
void initBarrier(Barrier* barrier, std::uint32_t arrivals);
void arriveAt(Barrier* barrier);
void arriveWithCopies(Barrier* barrier);
void waitAt(const Barrier* barrier, std::uint32_t parity);
void meetNumbered(int number, int threads, bool wait);

}  // namespace emulation

using emulation::arriveAt;
using emulation::arriveWithCopies;
using emulation::commitProducts;
using emulation::fenceProducts;
using emulation::fenceShared;
using emulation::initBarrier;
using emulation::sharedAddress;
using emulation::waitAt;

inline void storeShared16(void* target, const Words<4>& words) {
  storeWords<4>(target, words);
  emulation::noteStore(target, 16);
}

template <class T>
void multiplyShared(float (&sum)[64], std::uint64_t a, std::uint64_t b, bool accumulate) {
  emulation::multiply(sum, 128, {nullptr, a, b, false}, accumulate, __is_same(T, Half));
}
template <class T, int count>
void multiplyRegisters(float (&sum)[count], const std::uint32_t* a, std::uint64_t b) {
  emulation::multiply(sum, 2 * count, {a, 0, b, true}, true, __is_same(T, Half));
}

inline void finishBefore(float) {}

template <int pending, class... Registers>
void waitProducts(Registers&...) {
  emulation::LaneInput input{};
  input.word[0] = pending;
  emulation::meetWarp(emulation::WarpInstruction::kWaitProducts, input);
}

inline void syncNumbered(int number, int threads) {
  emulation::meetNumbered(number, threads, true);
}
inline void arriveNumbered(int number, int threads) {
  emulation::meetNumbered(number, threads, false);
}

template <int registers>
void takeRegisters() {}
template <int registers>
void giveRegisters() {}

}  // namespace lminf
