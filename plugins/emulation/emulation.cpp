#include "emulation.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>

#include "block.h"
#include "device.cuh"

namespace lminf::emulation {

Device device;
Block block;

void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel, block (%u, %u), thread %u: %s\n", blockIndex.x,
               blockIndex.y, threadIndex.x, what);
  std::abort();
}

void yield() { switchFiber(block.lanes[block.current]->fiber.point, block.scheduler); }

float elementOf(std::uint32_t word, int half, bool isHalf) {
  const auto bits = static_cast<std::uint16_t>(half ? word >> 16 : word);
  return isHalf ? floatOfHalf(bits) : bitsToFloat(static_cast<std::uint32_t>(bits) << 16);
}

void arrive(const std::vector<Copy>& copies, unsigned thread) {
  for (const Copy& copy : copies) {
    std::memcpy(copy.shared, copy.global, copy.bytes);
    noteWrite(copy.shared, copy.bytes, thread);
  }
}

namespace {

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr std::size_t kGuardBytes = 256;
constexpr unsigned kMaxThreads = 1024;

// mma.m16n8k16, A row-major, B column-major: PTX manual, "Matrix fragments for mma.m16n8k16".
void multiply(Lane* const* lanes, bool isHalf) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int quad = lane / 4, inQuad = lane % 4;
    const LaneInput& input = lanes[lane]->input;
    for (int element = 0; element < 8; ++element) {
      const int row = quad + (element / 2 % 2) * 8;
      const int column = inQuad * 2 + element % 2 + element / 4 * 8;
      a[row][column] = elementOf(input.word[element / 2], element % 2, isHalf);
    }
    for (int element = 0; element < 4; ++element) {
      const int row = inQuad * 2 + element % 2 + element / 2 * 8;
      b[row][quad] = elementOf(input.word[4 + element / 2], element % 2, isHalf);
    }
  }
  float product[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int inner = 0; inner < 16; ++inner) {
      for (int column = 0; column < 8; ++column) {
        product[row][column] += a[row][inner] * b[inner][column];
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int element = 0; element < 4; ++element) {
      const int row = lane / 4 + element / 2 * 8, column = lane % 4 * 2 + element % 2;
      lanes[lane]->output.sum[element] = lanes[lane]->input.sum[element] + product[row][column];
    }
  }
}

// ldmatrix.x4: lane 8 m + r gives row r of matrix m; a lane receives elements 2c, 2c + 1 of row
// lane / 4, or with .trans of column lane / 4.
void loadMatrix(Lane* const* lanes, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::uint16_t element[8][8];
    for (int row = 0; row < 8; ++row) {
      const auto* address =
          static_cast<const unsigned char*>(lanes[matrix * 8 + row]->input.address);
      if (address < block.shared || address + 16 > block.shared + block.sharedBytes) {
        fail("ldmatrix outside of shared memory");
      }
      std::memcpy(element[row], address, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const std::uint32_t low = transposed ? element[column][row] : element[row][column];
      const std::uint32_t high = transposed ? element[column + 1][row] : element[row][column + 1];
      lanes[lane]->output.word[matrix] = low | high << 16;
    }
  }
}

void transpose(Lane* const* lanes) {
  std::uint16_t element[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    std::memcpy(&element[lane / 4][lane % 4 * 2], &lanes[lane]->input.word[0], 4);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const std::uint32_t low = element[lane % 4 * 2][lane / 4];
    const std::uint32_t high = element[lane % 4 * 2 + 1][lane / 4];
    lanes[lane]->output.word[0] = low | high << 16;
  }
}

void shuffle(Lane* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    const auto other = static_cast<int>(lane ^ static_cast<int>(lanes[lane]->input.word[1]));
    if (other < 0 || other > 31) fail("shuffle with a lane that does not exist");
    lanes[lane]->output.word[0] = lanes[other]->input.word[0];
  }
}

void carryOut(WarpInstruction instruction, Lane* const* lanes) {
  switch (instruction) {
    case WarpInstruction::kShuffle: return shuffle(lanes);
    case WarpInstruction::kMultiplyHalf: return multiply(lanes, true);
    case WarpInstruction::kMultiplyBfloat16: return multiply(lanes, false);
    case WarpInstruction::kLoad: return loadMatrix(lanes, false);
    case WarpInstruction::kLoadTransposed: return loadMatrix(lanes, true);
    case WarpInstruction::kTranspose: return transpose(lanes);
    case WarpInstruction::kSync: return;
    case WarpInstruction::kWaitProducts: return finishProducts(lanes);
  }
}

void threadMain() {
  block.thread(block.context);
  Lane& lane = *block.lanes[block.current];
  // What a thread still had under way arrives some time.
  for (const auto& group : lane.groups) arrive(group, block.current);
  arrive(lane.open, block.current);
  lane.groups.clear();
  lane.open.clear();
  requireWaited();
  lane.done = true;
  yield();
}

// Runs a warp's lanes until all of them are done or wait for the block. Returns whether any ran.
bool runWarp(unsigned warp) {
  bool ran = false, again = true;
  while (again) {
    again = false;
    for (unsigned lane = 0; lane < 32 && warp * 32 + lane < block.threads; ++lane) {
      Lane& state = *block.lanes[warp * 32 + lane];
      if (state.done || state.atWarp || state.atBlock || isBlocked(state)) continue;
      block.current = warp * 32 + lane;
      threadIndex = state.index;
      switchFiber(block.scheduler, state.fiber.point);
      ran = again = true;
    }
  }
  return ran;
}

bool allAtBlock() {
  for (unsigned thread = 0; thread < block.threads; ++thread) {
    if (!block.lanes[thread]->atBlock) return false;
  }
  return true;
}

bool allDone() {
  for (unsigned thread = 0; thread < block.threads; ++thread) {
    if (!block.lanes[thread]->done) return false;
  }
  return true;
}

void prepareBlock() {
  std::fill(block.memory.begin(), block.memory.end(), kPoison);
  for (unsigned thread = 0; thread < block.threads; ++thread) {
    if (thread == block.lanes.size()) {
      block.lanes.push_back(std::make_unique<Lane>());
      block.lanes.back()->fiber.allocate(kStackBytes);
    }
    Lane& lane = *block.lanes[thread];
    lane.index = {thread, 0, 0};
    lane.done = lane.waited = lane.atWarp = lane.atBlock = false;
    lane.warpgroup = {};
    lane.fiber.start(threadMain);
  }
  block.warps.assign((block.threads + 31) / 32, Warp{});
  prepareHopper();
}

void runBlock() {
  prepareBlock();
  const auto warps = static_cast<unsigned>(block.warps.size());
  while (!allDone()) {
    bool ran = isPausing();
    ++block.turn;
    for (unsigned turn = 0; turn < warps; ++turn) {
      ran |= runWarp(device.reverse ? warps - 1 - turn : turn);
    }
    if (allAtBlock()) {
      for (unsigned thread = 0; thread < block.threads; ++thread) {
        block.lanes[thread]->atBlock = false;
      }
    } else if (!ran && !deliverCopies()) {
      fail("threads wait for each other for ever: a barrier or warp instruction not all reach");
    }
  }
  for (std::size_t byte = 0; byte < kGuardBytes; ++byte) {
    if (block.shared[block.sharedBytes + byte] != kPoison) fail("wrote behind shared memory");
    if (block.memory[byte] != kPoison) fail("wrote before shared memory");
  }
}

std::array<float, 65536> makeHalfTable() {
  std::array<float, 65536> table{};
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31,
                        fraction = bits & 1023;
    float value;
    if (exponent == 31) {
      value = bitsToFloat(sign | 0x7f800000u | fraction << 13);
    } else if (exponent > 0) {
      value = bitsToFloat(sign | (exponent + 112) << 23 | fraction << 13);
    } else {
      value = std::ldexp(static_cast<float>(fraction), -24);
      if (sign != 0) value = -value;
    }
    table[bits] = value;
  }
  return table;
}

}  // namespace

Index threadIndex{};
Index blockIndex{};
Counters counters{};

float floatOfHalf(std::uint16_t bits) {
  static const std::array<float, 65536> table = makeHalfTable();
  return table[bits];
}

std::uint16_t halfOfFloat(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7fffu;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (bits < 0x38800000u) {                        // below the smallest normal: fixed point
    return sign | static_cast<std::uint16_t>(std::nearbyint(std::ldexp(bitsToFloat(bits), 24)));
  }
  bits += 0xfffu + (bits >> 13 & 1);  // to nearest, ties to even
  return sign | static_cast<std::uint16_t>((bits - 0x38000000u) >> 13);
}

std::uint16_t bfloat16OfFloat(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  bits += 0x7fffu + (bits >> 16 & 1);
  return static_cast<std::uint16_t>(bits >> 16);
}

const void* aligned(const void* address, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) fail("misaligned access");
  return address;
}

LaneOutput meetWarp(WarpInstruction instruction, const LaneInput& input) {
  Lane& lane = *block.lanes[block.current];
  const unsigned first = block.current / 32 * 32;
  Warp& warp = block.warps[block.current / 32];
  if (warp.arrived == 0) warp.instruction = instruction;
  if (warp.instruction != instruction) fail("lanes of a warp meet in different instructions");
  lane.input = input;
  if (++warp.arrived < 32) {
    lane.atWarp = true;
    yield();
    return lane.output;
  }
  Lane* lanes[32];
  for (unsigned index = 0; index < 32; ++index) {
    lanes[index] = block.lanes[first + index].get();
    lanes[index]->atWarp = false;
  }
  carryOut(instruction, lanes);
  warp.arrived = 0;
  return lane.output;
}

void meetBlock() {
  block.lanes[block.current]->atBlock = true;
  yield();
}

int codeVersion() { return device.codeVersion; }

void waitForPrevious() {
  if (device.codeVersion >= kWaitingCode) block.lanes[block.current]->waited = true;
}

void requireWaited() {
  if (block.early && !block.lanes[block.current]->waited) {
    fail("starts early and goes on without waiting for the kernel ahead of it");
  }
}

unsigned char* blockShared() { return block.shared; }

void copyLater(void* shared, const void* global, std::size_t bytes) {
  const auto* target = static_cast<const unsigned char*>(aligned(shared, bytes));
  if (target < block.shared || target + bytes > block.shared + block.sharedBytes) {
    fail("cp.async outside of shared memory");
  }
  std::memset(shared, kPoison, bytes);  // from now on it may arrive at any time
  block.lanes[block.current]->open.push_back({shared, aligned(global, bytes), bytes});
  counters.copiedBytes += bytes;
}

void commitGroup() {
  Lane& lane = *block.lanes[block.current];
  lane.groups.push_back(std::move(lane.open));
  lane.open.clear();
}

void waitGroups(int pending) {
  Lane& lane = *block.lanes[block.current];
  while (lane.groups.size() > static_cast<std::size_t>(pending)) {
    arrive(lane.groups.front(), block.current);
    lane.groups.erase(lane.groups.begin());
  }
}

cudaError_t runGrid(unsigned gridX, unsigned gridY, unsigned threads, std::size_t sharedBytes,
                    bool early, Thread thread, const void* context) {
  if (gridX == 0 || gridY == 0 || gridX > 0x7fffffffu || gridY > 65535 || threads == 0 ||
      threads % 32 != 0 || threads > kMaxThreads ||
      sharedBytes > static_cast<std::size_t>(device.sharedBytes)) {
    return cudaErrorInvalidConfiguration;
  }
  ++counters.launches;
  if (early) ++counters.earlyLaunches;
  block.early = early;
  block.threads = threads;
  block.thread = thread;
  block.context = context;
  block.sharedBytes = sharedBytes;
  block.memory.resize(sharedBytes + 2 * kGuardBytes + kSharedAlignment);
  const auto start = reinterpret_cast<std::uintptr_t>(block.memory.data()) + kGuardBytes;
  block.shared = reinterpret_cast<unsigned char*>((start + kSharedAlignment - 1) /
                                                  kSharedAlignment * kSharedAlignment);
  for (unsigned y = 0; y < gridY; ++y) {
    blockIndex.y = device.reverse ? gridY - 1 - y : y;
    for (unsigned x = 0; x < gridX; ++x) {
      blockIndex.x = device.reverse ? gridX - 1 - x : x;
      runBlock();
    }
  }
  return cudaSuccess;
}

}  // namespace lminf::emulation
