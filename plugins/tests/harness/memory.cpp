#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace harness {
namespace {

constexpr std::size_t kGuard = 256;  // keeps the alignment of the block
constexpr char kPoison = '\xFF';

class Host final : public Device {
 public:
  void* allocate(std::size_t bytes) override {
    void* address = std::aligned_alloc(kGuard, (bytes + kGuard - 1) / kGuard * kGuard);
    if (address == nullptr) throw std::runtime_error("no memory");
    return address;
  }
  void free(void* address) override { std::free(address); }
  void upload(void* to, const void* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
  }
  void synchronize() override {}
  cudaStream_t stream() override { return nullptr; }
  void beginCapture() override { throw std::runtime_error("--graph needs --device cuda"); }
  void endCaptureAndRun() override {}
};

#ifdef LMINF_HARNESS_CUDA

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

class Gpu final : public Device {
 public:
  Gpu() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Gpu() override { cudaStreamDestroy(stream_); }
  void* allocate(std::size_t bytes) override {
    void* address = nullptr;
    check(cudaMalloc(&address, bytes));
    return address;
  }
  void free(void* address) override { cudaFree(address); }
  void upload(void* to, const void* from, std::size_t bytes) override {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
    synchronize();
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
    synchronize();
  }
  void synchronize() override { check(cudaStreamSynchronize(stream_)); }
  cudaStream_t stream() override { return stream_; }
  void beginCapture() override {
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  }
  void endCaptureAndRun() override {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    check(cudaStreamEndCapture(stream_, &graph));
    check(cudaGraphInstantiate(&executable, graph, 0));
    check(cudaGraphLaunch(executable, stream_));
    synchronize();
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  }

 private:
  cudaStream_t stream_ = nullptr;
};

#endif

}  // namespace

std::unique_ptr<Device> openDevice(const std::string& name) {
  if (name == "cpu") return std::make_unique<Host>();
#ifdef LMINF_HARNESS_CUDA
  if (name == "cuda") return std::make_unique<Gpu>();
#endif
  throw std::runtime_error("--device " + name + ": this harness was not built for it");
}

Buffer::Buffer(Device& device, std::size_t bytes)
    : device_(device), bytes_(bytes), block_(device.allocate(bytes + 2 * kGuard)) {
  const std::vector<char> fill(bytes + 2 * kGuard, kPoison);
  device_.upload(block_, fill.data(), fill.size());
}

Buffer::~Buffer() { device_.free(block_); }

void* Buffer::data() const { return static_cast<char*>(block_) + kGuard; }

void Buffer::write(const std::vector<char>& bytes) {
  if (bytes.size() != bytes_) {
    throw std::runtime_error("a file has " + std::to_string(bytes.size()) + " bytes, its tensor " +
                             std::to_string(bytes_));
  }
  device_.upload(data(), bytes.data(), bytes_);
}

std::vector<char> Buffer::read() const {
  std::vector<char> bytes(bytes_);
  device_.download(bytes.data(), data(), bytes_);
  return bytes;
}

void Buffer::poison() { write(std::vector<char>(bytes_, kPoison)); }

bool Buffer::guardsIntact() const {
  std::vector<char> all(bytes_ + 2 * kGuard);
  device_.download(all.data(), block_, all.size());
  for (std::size_t index = 0; index < kGuard; ++index) {
    if (all[index] != kPoison || all[kGuard + bytes_ + index] != kPoison) return false;
  }
  return true;
}

}  // namespace harness
