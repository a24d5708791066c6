#include "huge_pages.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lminf {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSlab = size_t{64} << 20;
constexpr size_t kLarge = size_t{1} << 20;    // reserved in slabs
constexpr size_t kReused = size_t{64} << 10;  // kept for the next step instead of given back
constexpr size_t kMostKept = size_t{256} << 20;

size_t roundUp(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

// What a session takes while it is made stays until it ends: weights stand side by side in slabs,
// so that only the last page of a slab is not full. A slab goes when its last block has gone.
class Slabs {
 public:
  void* take(size_t size) {
    size = roundUp(size, kAlignment);
    if (used_ + size > size_) open(size);
    if (current_ == nullptr) return nullptr;
    char* block = current_ + used_;
    used_ += size;
    ++live_[current_].blocks;
    return block;
  }

  // Returns whether the block was one of ours.
  bool give(void* block) {
    auto slab = live_.upper_bound(static_cast<char*>(block));
    if (slab == live_.begin()) return false;
    --slab;
    if (static_cast<char*>(block) >= slab->first + slab->second.size) return false;
    if (--slab->second.blocks > 0) return true;
    if (slab->first == current_) current_ = nullptr, used_ = size_ = 0;
    unmap(slab->first, slab->second.size);
    live_.erase(slab);
    return true;
  }

 private:
  struct Slab {
    size_t size;
    size_t blocks;
  };

  void open(size_t size) {
    const size_t wanted = roundUp(std::max(size, kSlab), kHugePage);
    char* slab = map(wanted);
    if (current_ != nullptr && live_[current_].blocks == 0) {
      unmap(current_, live_[current_].size);
      live_.erase(current_);
    }
    current_ = slab, used_ = 0, size_ = slab == nullptr ? 0 : wanted;
    if (slab != nullptr) live_[slab] = {wanted, 0};
  }

#if defined(__linux__)
  static char* map(size_t size) {
    // Mapped with room to begin at a huge page; what is over goes back.
    void* whole =
        mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED) return nullptr;
    char* start = static_cast<char*>(whole);
    char* slab = reinterpret_cast<char*>(roundUp(reinterpret_cast<uintptr_t>(start), kHugePage));
    if (slab > start) munmap(start, slab - start);
    if (slab < start + kHugePage) munmap(slab + size, start + kHugePage - slab);
    madvise(slab, size, MADV_HUGEPAGE);  // advice: without huge pages it is plain memory
    return slab;
  }
  static void unmap(char* slab, size_t size) { munmap(slab, size); }
#else
  static char* map(size_t size) { return static_cast<char*>(std::aligned_alloc(kHugePage, size)); }
  static void unmap(char* slab, size_t) { std::free(slab); }
#endif

  std::map<char*, Slab> live_;
  char* current_ = nullptr;
  size_t used_ = 0, size_ = 0;
};

// What a step takes it takes again in the next one: freed blocks are kept for it.
class Steps {
 public:
  void* take(size_t size) {
    size = roundUp(size, kAlignment);
    const auto free = free_.lower_bound(size);
    if (size >= kReused && free != free_.end() && free->first <= 2 * size) {
      void* block = free->second;
      kept_ -= free->first;
      taken_[block] = free->first;
      free_.erase(free);
      return block;
    }
    void* block = std::aligned_alloc(kAlignment, std::max(size, kAlignment));
    if (block != nullptr && size >= kReused) taken_[block] = size;
    return block;
  }

  void give(void* block) {
    const auto taken = taken_.find(block);
    if (taken != taken_.end() && kept_ + taken->second <= kMostKept) {
      kept_ += taken->second;
      free_.emplace(taken->second, block);
      taken_.erase(taken);
      return;
    }
    if (taken != taken_.end()) taken_.erase(taken);
    std::free(block);
  }

 private:
  std::multimap<size_t, void*> free_;
  std::map<void*, size_t> taken_;
  size_t kept_ = 0;
};

struct HugePages : abi::Allocator {
  std::mutex mutex;
  Slabs slabs;
  Steps steps;
  const abi::MemoryInfo* memory = nullptr;

  HugePages() : abi::Allocator{} {
    version = abi::kAllocatorVersion;
    alloc = [](abi::Allocator* self, size_t size) { return of(self)->take(size, false); };
    reserve = [](abi::Allocator* self, size_t size) { return of(self)->take(size, true); };
    free = [](abi::Allocator* self, void* block) { of(self)->give(block); };
    info = [](const abi::Allocator* self) { return static_cast<const HugePages*>(self)->memory; };
  }

  static HugePages* of(abi::Allocator* self) { return static_cast<HugePages*>(self); }

  void* take(size_t size, bool stays) {
    if (size == 0) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex);
    try {
      return stays && size >= kLarge ? slabs.take(size) : steps.take(size);
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }

  void give(void* block) {
    if (block == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!slabs.give(block)) steps.give(block);
  }
};

bool ignored(const abi::Api* api, abi::Status* wrong) {
  if (wrong != nullptr) abi::call<abi::kReleaseStatus>(api, wrong);
  return wrong != nullptr;
}

}  // namespace

bool registerHugePages(const abi::Api* api) {
  static const bool registered = [api] {
    abi::Env* env = nullptr;  // the process has one; this finds it
    abi::MemoryInfo* memory = nullptr;
    if (ignored(api, abi::call<abi::kCreateEnv>(api, abi::kLogWarning, "lminf", &env)) ||
        ignored(api, abi::call<abi::kCreateCpuMemoryInfo>(api, abi::kDeviceAllocator,
                                                          abi::kMemoryDefault, &memory))) {
      return false;
    }
    // Never destroyed: the environment may outlive every static object.
    static HugePages* allocator = new HugePages;
    allocator->memory = memory;
    return !ignored(
        api, abi::call<abi::kRegisterAllocator>(api, env, static_cast<abi::Allocator*>(allocator)));
  }();
  return registered;
}

void adviseHugePages(const void* memory, size_t size) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory) / kPage * kPage;
  const uintptr_t end = roundUp(reinterpret_cast<uintptr_t>(memory) + size, kPage);
  if (size >= kHugePage) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
  (void)memory, (void)size;
#endif
}

}  // namespace lminf
