// The block that is being emulated, for the sources of the emulation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "emulation.h"
#include "fiber.h"

namespace lminf::emulation {

constexpr unsigned char kPoison = 0xff;  // NaN in every type
constexpr std::size_t kSharedAlignment = 1024;

struct Device {
  int multiprocessors = 4;
  int sharedBytes = 101376;
  bool reverse = false;
  bool hopper = false;
  bool eager = false;  // copies that arrive at a barrier do so at once, not as late as can be
  int driverVersion = 13000;
  int codeVersion = 90;  // what the kernels are compiled for
};
extern Device device;

struct Copy {
  void* shared;
  const void* global;
  std::size_t bytes;
};

// One product of a warpgroup, as one lane has issued it.
struct Product {
  float* sum;
  int columns;
  const std::uint32_t* registers;  // the first operand, or null: then it is matrix `a`
  std::uint64_t a, b;
  bool columnsContiguous;  // of b
  bool accumulate;
  bool isHalf;
  bool startsChain;          // no product under way has this sum
  std::vector<float> start;  // then what it held
  std::uint64_t sources;     // what shared memory held of a and b
};

struct Arrival {
  std::vector<Copy> copies;
  std::uint64_t* barrier;
};

// What a lane waits for, and what of a warpgroup's instructions it has under way.
struct WarpgroupState {
  const std::uint64_t* barrier = nullptr;
  std::uint32_t parity = 0;
  int numbered = -1;
  std::uint64_t generation = 0;
  std::uint64_t resumes = 0;  // the turn of the block in which it goes on
  bool fenced = false;        // wgmma.fence since the last wait
  std::uint64_t sharedFence = 0;
  std::vector<Arrival> arrivals;
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
};

struct Lane {
  Fiber fiber;
  Index index{};
  bool done = false;
  bool waited = false;  // for the kernel ahead
  bool atWarp = false;
  bool atBlock = false;
  LaneInput input{};
  LaneOutput output{};
  std::vector<Copy> open;                 // copies not committed yet
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  WarpgroupState warpgroup;
};

struct Warp {
  WarpInstruction instruction{};
  int arrived = 0;
};

struct Block {
  std::vector<std::unique_ptr<Lane>> lanes;
  std::vector<Warp> warps;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  std::size_t sharedBytes = 0;
  unsigned threads = 0;
  unsigned current = 0;
  bool early = false;
  std::uint64_t turn = 0;
  Thread thread = nullptr;
  const void* context = nullptr;
  FiberPoint scheduler{};
};
extern Block block;

[[noreturn]] void fail(const char* what);
void yield();
float elementOf(std::uint32_t word, int half, bool isHalf);
void arrive(const std::vector<Copy>& copies, unsigned thread);

// hopper.cpp
void prepareHopper();
bool isBlocked(Lane& lane);
bool isPausing();
// Where nothing else can go on: one thread's oldest copies arrive. Returns whether there were any.
bool deliverCopies();
void finishProducts(Lane* const* lanes);
void noteWrite(const void* target, std::size_t bytes, unsigned thread);

}  // namespace lminf::emulation
