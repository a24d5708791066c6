// Weights of a mapped file through huge pages.
//
// onnxruntime maps a file once for every tensor, at addresses that no huge page fits: all but the
// largest are read through pages of 4 KiB. Here the file is mapped once more as a whole, at an
// address at which huge pages of the page cache can be seen as such. It is the same memory.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>

namespace lminf {

// A tensor that stays where it is, as weights do.
class MappedWeight {
 public:
  // Returns where to read the `size` bytes at `memory`: in a mapping of the whole file if a file
  // backs them, the system tells which, and it holds the same bytes; else `memory`.
  const void* at(const void* memory, size_t size);

 private:
  std::once_flag once_;
  const void* from_ = nullptr;
  const void* to_ = nullptr;
  std::shared_ptr<const void> file_;  // mapped as long as this lives
};

}  // namespace lminf
