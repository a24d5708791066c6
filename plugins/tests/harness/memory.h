// Memory the plugin is given: a GPU's, or this machine's in its place. Every block has guard
// bytes around it and is filled with 0xFF, which is NaN in every floating type.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace harness {

// One kind of memory and the stream the kernels run on. Calls throw std::runtime_error.
class Device {
 public:
  virtual ~Device() = default;
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void free(void* address) = 0;
  virtual void upload(void* to, const void* from, std::size_t bytes) = 0;
  virtual void download(void* to, const void* from, std::size_t bytes) = 0;
  virtual void synchronize() = 0;
  virtual cudaStream_t stream() = 0;
  // Between these two, work on the stream is recorded instead of done; the second does it.
  virtual void beginCapture() = 0;
  virtual void endCaptureAndRun() = 0;
};

// "cpu", or "cuda" where the harness was built for it.
std::unique_ptr<Device> openDevice(const std::string& name);

// A block of device memory.
class Buffer {
 public:
  Buffer(Device& device, std::size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const;
  std::size_t size() const { return bytes_; }
  void write(const std::vector<char>& bytes);
  std::vector<char> read() const;
  void poison();
  bool guardsIntact() const;

 private:
  Device& device_;
  std::size_t bytes_;
  void* block_;
};

}  // namespace harness
