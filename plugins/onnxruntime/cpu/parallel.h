// What operators share to run in pieces: dealing the pieces out, and memory each thread keeps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace lminf::cpu {

// Runs body(data, i) for i = 0 … count − 1, in any order, possibly at once.
struct Parallel {
  void* context;
  void (*run)(void* context, size_t count, void (*body)(void* data, size_t index), void* data);
};

inline int64_t ceilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory of one thread that only grows.
class Arena {
 public:
  // 64-byte aligned; null where there is none.
  float* take(size_t floats) {
    if (floats > size_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64)));
      size_ = memory_ == nullptr ? 0 : floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  size_t size_ = 0;
};

// body(i) for i = 0 … count − 1, in any order, possibly at once.
template <typename Body>
void forEach(const Parallel& parallel, size_t count, Body body) {
  if (count == 1) return body(0);
  parallel.run(
      parallel.context, count, [](void* data, size_t index) { (*static_cast<Body*>(data))(index); },
      &body);
}

}  // namespace lminf::cpu
