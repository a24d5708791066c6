#include "mapped_weight.h"

#include "huge_pages.h"

#if defined(__linux__)
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <utility>
#endif

namespace lminf {
namespace {

constexpr size_t kLeast = size_t{64} << 10;  // smaller tensors stay in the cache

#if defined(__linux__)

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kCompared = 4096;

// PROCMAP_QUERY of linux/fs.h (6.11 and newer), which older headers lack.
struct MapQuery {
  uint64_t size, flags, address, start, end, found, pageSize, offset, inode;
  uint32_t major, minor, nameSize, buildIdSize;
  uint64_t name, buildId;
};
constexpr uint64_t kFileBacked = 0x20;
constexpr unsigned long kMapQuery = _IOWR('f', 17, MapQuery);

class Descriptor {
 public:
  explicit Descriptor(const char* path) : number(open(path, O_RDONLY | O_CLOEXEC)) {}
  ~Descriptor() {
    if (number >= 0) close(number);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  const int number;
};

// A whole file, mapped for reading.
struct MappedFile {
  const char* start;
  size_t size;

  MappedFile(const char* start, size_t size) : start(start), size(size) {}
  ~MappedFile() { munmap(const_cast<char*>(start), size); }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
};

std::shared_ptr<const MappedFile> mapWhole(int file, size_t size) {
  // Reserved with room to begin at a huge page; what is over goes back.
  const size_t reserved = size + kHugePage;
  void* whole = mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(whole);
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  char* start = begin + (kHugePage - address % kHugePage) % kHugePage;
  if (mmap(start, size, PROT_READ, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) {
    munmap(whole, reserved);
    return nullptr;
  }
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  char* end = start + (size + page - 1) / page * page;
  if (start > begin) munmap(begin, static_cast<size_t>(start - begin));
  if (end < begin + reserved) munmap(end, static_cast<size_t>(begin + reserved - end));
  madvise(start, size, MADV_HUGEPAGE);  // advice
  return std::make_shared<const MappedFile>(start, size);
}

// The mapping of a file that sessions share; null if there is none.
std::shared_ptr<const MappedFile> wholeFile(const char* path, const MapQuery& found) {
  static std::mutex mutex;
  static auto& files = *new std::map<std::pair<dev_t, ino_t>, std::weak_ptr<const MappedFile>>;
  const Descriptor file(path);
  struct stat told{};
  if (file.number < 0 || fstat(file.number, &told) != 0 || told.st_ino != found.inode ||
      told.st_dev != makedev(found.major, found.minor) || told.st_size <= 0) {
    return nullptr;
  }
  const size_t size = static_cast<size_t>(told.st_size);
  const std::lock_guard<std::mutex> lock(mutex);
  auto& known = files[{told.st_dev, told.st_ino}];
  std::shared_ptr<const MappedFile> mapped = known.lock();
  if (mapped == nullptr || mapped->size != size) {
    mapped = mapWhole(file.number, size);
    known = mapped;
  }
  return mapped;
}

const void* inWholeFile(const void* memory, size_t size, std::shared_ptr<const void>* owner) {
  static const Descriptor maps("/proc/self/maps");
  if (maps.number < 0) return nullptr;
  char path[4096] = {};
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  MapQuery query{};
  query.size = sizeof query, query.flags = kFileBacked, query.address = address;
  query.name = reinterpret_cast<uintptr_t>(path), query.nameSize = sizeof path;
  if (ioctl(maps.number, kMapQuery, &query) != 0 || query.nameSize == 0) return nullptr;
  if (address < query.start || address + size > query.end) return nullptr;
  const uint64_t offset = query.offset + (address - query.start);
  const std::shared_ptr<const MappedFile> file = wholeFile(path, query);
  if (file == nullptr || offset + size > file->size) return nullptr;
  const char* found = file->start + offset;
  const char* given = static_cast<const char*>(memory);
  const size_t some = std::min(size, kCompared), last = size - some;
  if (std::memcmp(found, given, some) != 0 || std::memcmp(found + last, given + last, some) != 0) {
    return nullptr;
  }
  *owner = file;
  return found;
}

#else

const void* inWholeFile(const void*, size_t, std::shared_ptr<const void>*) { return nullptr; }

#endif

}  // namespace

const void* MappedWeight::at(const void* memory, size_t size) {
  if (memory == nullptr || size < kLeast) return memory;
  std::call_once(once_, [&] {
    const void* found = inWholeFile(memory, size, &file_);
    if (found == nullptr) adviseHugePages(memory, size);
    from_ = memory, to_ = found == nullptr ? memory : found;
  });
  return memory == from_ ? to_ : memory;
}

}  // namespace lminf
