#include "hopper.h"

#include <array>

#include "block.h"

namespace lminf::emulation {
namespace {

constexpr std::size_t kUnit = 16;              // bytes of shared memory whose last write is known
constexpr std::uint32_t kFirstAddress = 1024;  // a device keeps the first KiB for itself
constexpr int kNumberedBarriers = 16;

struct Write {
  std::uint64_t time = 0;
  unsigned thread = 0;
};

struct Numbered {
  int arrived = 0;
  int threads = 0;
  std::uint64_t generation = 0;
};

std::uint64_t now = 0;
std::vector<Write> writes;
std::array<Numbered, kNumberedBarriers> numbered;

// What a barrier of shared memory holds.
struct BarrierState {
  std::uint16_t mark;
  std::uint16_t arrivals;
  std::uint16_t left;
  std::uint16_t parity;
};
constexpr std::uint16_t kBarrierMark = 0x6261;
static_assert(sizeof(BarrierState) == sizeof(Barrier), "a barrier takes 8 bytes");

Lane& currentLane() { return *block.lanes[block.current]; }

// After an arrival, so that those who waited for it go first.
void pause() {
  currentLane().warpgroup.resumes = block.turn + 2;
  yield();
}

BarrierState stateOf(const Barrier* barrier) {
  const auto* address = reinterpret_cast<const unsigned char*>(barrier);
  if (address < block.shared || address + 8 > block.shared + block.sharedBytes) {
    fail("a barrier outside of shared memory");
  }
  BarrierState state;
  std::memcpy(&state, aligned(barrier, 8), sizeof(state));
  if (state.mark != kBarrierMark) fail("a barrier that nobody has set up");
  return state;
}

void countArrival(Barrier* barrier) {
  BarrierState state = stateOf(barrier);
  if (--state.left == 0) {
    state.left = state.arrivals;
    state.parity ^= 1u;
  }
  std::memcpy(barrier, &state, sizeof(state));
}

// One thread's oldest copies arrive, if there are any.
bool deliverOldest(unsigned thread) {
  auto& arrivals = block.lanes[thread]->warpgroup.arrivals;
  if (arrivals.empty()) return false;
  arrive(arrivals.front().copies, thread);
  countArrival(arrivals.front().barrier);
  arrivals.erase(arrivals.begin());
  return true;
}

// Where an element of a matrix lies: PTX manual, "Shared memory matrix layout" of wgmma, for rows
// or columns of 128 bytes under the 128-byte pattern.
std::size_t elementOffset(std::uint64_t matrix, bool columnsContiguous, int inner, int outer) {
  const auto address = static_cast<std::uint32_t>(matrix & 0x3fffu) << 4;
  const auto partDistance = static_cast<std::uint32_t>(matrix >> 16 & 0x3fffu) << 4;
  const auto groupDistance = static_cast<std::uint32_t>(matrix >> 32 & 0x3fffu) << 4;
  if (matrix >> 62 != 1 || (matrix >> 49 & 7u) != 0) fail("wgmma with an unknown pattern");
  std::uint32_t linear;
  if (columnsContiguous) {
    linear = address + static_cast<std::uint32_t>(outer / 64) * partDistance +
             static_cast<std::uint32_t>(inner / 8) * groupDistance +
             static_cast<std::uint32_t>(inner % 8 * 128 + outer % 64 * 2);
  } else {
    linear = address + static_cast<std::uint32_t>(outer / 8) * groupDistance +
             static_cast<std::uint32_t>(outer % 8 * 128 + inner * 2);
  }
  const std::uint32_t swizzled = linear ^ (linear >> 7 & 7u) << 4;
  if (swizzled < kFirstAddress || swizzled - kFirstAddress + 2 > block.sharedBytes) {
    fail("wgmma outside of shared memory");
  }
  return swizzled - kFirstAddress;
}

// Visits the elements of one operand of a product: 16 inner, `outer` others.
template <class Visit>
void visitMatrix(std::uint64_t matrix, bool columnsContiguous, int firstOuter, int outer,
                 const Visit& visit) {
  for (int other = 0; other < outer; ++other) {
    for (int inner = 0; inner < 16; ++inner) {
      visit(inner, other, elementOffset(matrix, columnsContiguous, inner, firstOuter + other));
    }
  }
}

std::uint16_t bitsAt(std::size_t offset) {
  std::uint16_t bits;
  std::memcpy(&bits, block.shared + offset, sizeof(bits));
  return bits;
}

template <class Visit>
void visitSources(const Product& product, int warpInGroup, const Visit& visit) {
  visitMatrix(product.b, product.columnsContiguous, 0, product.columns, visit);
  if (product.registers == nullptr) visitMatrix(product.a, false, 16 * warpInGroup, 16, visit);
}

int warpInGroup() { return static_cast<int>(block.current / 32 % 4); }

// A number that changes with what a product reads of shared memory.
std::uint64_t sourcesOf(const Product& product) {
  std::uint64_t hash = 1469598103934665603u;
  visitSources(product, warpInGroup(), [&](int, int, std::size_t offset) {
    hash = (hash ^ bitsAt(offset)) * 1099511628211u;
  });
  return hash;
}

void requireFences(const Product& product) {
  const std::uint64_t own = currentLane().warpgroup.sharedFence;
  visitSources(product, warpInGroup(), [&](int, int, std::size_t offset) {
    const Write& write = writes[offset / kUnit];
    if (own < write.time && block.lanes[write.thread]->warpgroup.sharedFence < write.time) {
      fail("wgmma reads what was written to shared memory without a fence");
    }
  });
}

bool isUnderWay(const WarpgroupState& state, const float* sum) {
  for (const Product& product : state.open) {
    if (product.sum == sum) return true;
  }
  for (const auto& group : state.groups) {
    for (const Product& product : group) {
      if (product.sum == sum) return true;
    }
  }
  return false;
}

bool isSameProduct(const Product& one, const Product& other) {
  return one.columns == other.columns && one.a == other.a && one.b == other.b &&
         one.accumulate == other.accumulate && one.isHalf == other.isHalf &&
         (one.registers == nullptr) == (other.registers == nullptr);
}

// Carries out one product for the 16 rows of a warp.
void carryOut(Lane* const* lanes, std::size_t place) {
  const Product& product = lanes[0]->warpgroup.groups.front()[place];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& group = lanes[lane]->warpgroup.groups.front();
    if (place >= group.size() || !isSameProduct(group[place], product)) {
      fail("lanes of a warp wait for different products");
    }
  }
  if (product.sources != sourcesOf(product)) {
    fail("shared memory changed while wgmma was reading it");
  }
  const auto columns = static_cast<std::size_t>(product.columns);
  float a[16][16];
  std::vector<float> b(16 * columns);
  const auto valueAt = [&](std::size_t offset) {
    return elementOf(bitsAt(offset), 0, product.isHalf);
  };
  visitMatrix(product.b, product.columnsContiguous, 0, product.columns,
              [&](int inner, int column, std::size_t offset) {
                b[static_cast<std::size_t>(inner) * columns + static_cast<std::size_t>(column)] =
                    valueAt(offset);
              });
  if (product.registers == nullptr) {
    visitMatrix(product.a, false, 16 * warpInGroup(), 16,
                [&](int inner, int row, std::size_t offset) { a[row][inner] = valueAt(offset); });
  } else {
    for (int lane = 0; lane < 32; ++lane) {
      const std::uint32_t* words = lanes[lane]->warpgroup.groups.front()[place].registers;
      for (int element = 0; element < 8; ++element) {
        const int row = lane / 4 + element / 2 % 2 * 8;
        const int inner = lane % 4 * 2 + element % 2 + element / 4 * 8;
        a[row][inner] = elementOf(words[element / 2], element % 2, product.isHalf);
      }
    }
  }
  std::vector<float> sums(columns);
  for (int row = 0; row < 16; ++row) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (std::size_t inner = 0; inner < 16; ++inner) {
      for (std::size_t column = 0; column < columns; ++column) {
        sums[column] += a[row][inner] * b[inner * columns + column];
      }
    }
    for (std::size_t column = 0; column < columns; ++column) {
      const std::size_t lane = static_cast<std::size_t>(row % 8) * 4 + column % 8 / 2;
      const std::size_t element =
          column / 8 * 4 + static_cast<std::size_t>(row / 8) * 2 + column % 2;
      Product& own = lanes[lane]->warpgroup.groups.front()[place];
      if (own.startsChain) own.sum[element] = own.start[element];
      own.sum[element] = (own.accumulate ? own.sum[element] : 0.0f) + sums[column];
    }
  }
}

}  // namespace

void prepareHopper() {
  now = 0;
  block.turn = 0;
  writes.assign(block.sharedBytes / kUnit + 1, Write{});
  numbered.fill({});
}

void noteWrite(const void* target, std::size_t bytes, unsigned thread) {
  const auto first =
      static_cast<std::size_t>(static_cast<const unsigned char*>(target) - block.shared);
  ++now;
  for (std::size_t unit = first / kUnit; unit <= (first + bytes - 1) / kUnit; ++unit) {
    writes[unit] = {now, thread};
  }
}

bool isPausing() {
  for (unsigned thread = 0; thread < block.threads; ++thread) {
    if (block.lanes[thread]->warpgroup.resumes > block.turn) return true;
  }
  return false;
}

bool isBlocked(Lane& lane) {
  WarpgroupState& state = lane.warpgroup;
  if (state.resumes > block.turn) return true;
  if (state.barrier != nullptr) {
    if (stateOf(state.barrier).parity == state.parity) return true;
    state.barrier = nullptr;
  }
  if (state.numbered >= 0) {
    if (numbered[static_cast<std::size_t>(state.numbered)].generation == state.generation) {
      return true;
    }
    state.numbered = -1;
  }
  return false;
}

bool deliverCopies() {
  for (unsigned turn = 0; turn < block.threads; ++turn) {
    if (deliverOldest(device.reverse ? block.threads - 1 - turn : turn)) return true;
  }
  return false;
}

void finishProducts(Lane* const* lanes) {
  const std::size_t pending = lanes[0]->input.word[0];
  for (int lane = 0; lane < 32; ++lane) {
    const WarpgroupState& state = lanes[lane]->warpgroup;
    if (lanes[lane]->input.word[0] != pending ||
        state.groups.size() != lanes[0]->warpgroup.groups.size()) {
      fail("lanes of a warp wait for different products");
    }
    lanes[lane]->warpgroup.fenced = false;
  }
  while (lanes[0]->warpgroup.groups.size() > pending) {
    const std::size_t count = lanes[0]->warpgroup.groups.front().size();
    for (std::size_t place = 0; place < count; ++place) carryOut(lanes, place);
    for (int lane = 0; lane < 32; ++lane) {
      auto& groups = lanes[lane]->warpgroup.groups;
      groups.erase(groups.begin());
    }
  }
}

std::uint32_t sharedAddress(const void* shared) {
  return kFirstAddress +
         static_cast<std::uint32_t>(static_cast<const unsigned char*>(shared) - block.shared);
}

void fenceProducts() { currentLane().warpgroup.fenced = true; }
void fenceShared() { currentLane().warpgroup.sharedFence = ++now; }
void noteStore(const void* target, std::size_t bytes) { noteWrite(target, bytes, block.current); }

void multiply(float* sum, int columns, const ProductSources& sources, bool accumulate,
              bool isHalf) {
  WarpgroupState& state = currentLane().warpgroup;
  if (!state.fenced) fail("wgmma without wgmma.fence");
  Product product{sum,        columns,   sources.registers,
                  sources.a,  sources.b, sources.columnsContiguous,
                  accumulate, isHalf,    false,
                  {},         0};
  product.startsChain = !isUnderWay(state, sum);
  if (product.startsChain) {
    product.start.assign(sum, sum + columns / 2);
    std::memset(sum, kPoison, static_cast<std::size_t>(columns / 2) * sizeof(float));
  }
  if (block.current % 32 == 0) {
    requireFences(product);
    product.sources = sourcesOf(product);
  }
  state.open.push_back(std::move(product));
}

void commitProducts() {
  WarpgroupState& state = currentLane().warpgroup;
  state.groups.push_back(std::move(state.open));
  state.open.clear();
}

void initBarrier(Barrier* barrier, std::uint32_t arrivals) {
  const BarrierState state{kBarrierMark, static_cast<std::uint16_t>(arrivals),
                           static_cast<std::uint16_t>(arrivals), 0};
  std::memcpy(barrier, &state, sizeof(state));
}

void arriveAt(Barrier* barrier) {
  countArrival(barrier);
  pause();
}

void arriveWithCopies(Barrier* barrier) {
  Lane& lane = currentLane();
  stateOf(barrier);
  Arrival arrival{{}, barrier};
  for (const auto& group : lane.groups) {
    arrival.copies.insert(arrival.copies.end(), group.begin(), group.end());
  }
  arrival.copies.insert(arrival.copies.end(), lane.open.begin(), lane.open.end());
  lane.groups.clear();
  lane.open.clear();
  lane.warpgroup.arrivals.push_back(std::move(arrival));
  if (device.eager) deliverOldest(block.current);
}

void waitAt(const Barrier* barrier, std::uint32_t parity) {
  if (stateOf(barrier).parity != parity) return;
  currentLane().warpgroup.barrier = barrier;
  currentLane().warpgroup.parity = parity;
  yield();
}

void meetNumbered(int number, int threads, bool wait) {
  if (number < 0 || number >= kNumberedBarriers) fail("a numbered barrier that does not exist");
  Numbered& barrier = numbered[static_cast<std::size_t>(number)];
  if (barrier.arrived == 0) barrier.threads = threads;
  if (barrier.threads != threads) fail("a numbered barrier with different numbers of threads");
  const std::uint64_t generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return wait ? void() : pause();
  }
  if (!wait) return pause();
  currentLane().warpgroup.numbered = number;
  currentLane().warpgroup.generation = generation;
  yield();
}

}  // namespace lminf::emulation
