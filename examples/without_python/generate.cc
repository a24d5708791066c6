// Continues a text, given as token ids, with a bundle's graph: onnxruntime's C API, no more.
//
//   generate BUNDLE/model.onnx NUM_TOKENS TOKEN_ID [TOKEN_ID ...]
//
// Prints one line for each new token: its id and its logit. LMINF_KERNELS=PATH in the environment
// loads the library of kernels that lminf-export installs; without it onnxruntime runs the bodies
// that the graph carries. docs/without_python.md explains every step; build.sh builds this file.

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

const OrtApi* const ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
constexpr int64_t kFirstSlots = 64;
const std::string kPast = "past_key_values.", kPresent = "present.";

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = ort->GetErrorMessage(status);
  ort->ReleaseStatus(status);
  throw std::runtime_error(message);
}

// Owns an object of onnxruntime's.
template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

size_t item_size(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return 4;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return 1;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return 2;
    default: throw std::runtime_error("a cache of a type this program does not know");
  }
}

// One cache of the graph: rings, starting tokens, or the scales of rings of int8.
struct Cache {
  std::string past, present;
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;
  int64_t capacity;  // of the ring in dimension 2; 0 if that has a fixed size
  std::vector<char> bytes;

  // Gives the ring more slots; one that has not wrapped has position p in slot p.
  void resize(int64_t slots) {
    if (capacity == 0 && !bytes.empty()) return;
    const int64_t before = bytes.empty() ? 0 : shape[2];
    if (capacity != 0) shape[2] = std::min(slots, capacity);
    if (before == shape[2]) return;
    const size_t row = static_cast<size_t>(shape[3]) * item_size(type);
    const size_t old_head = static_cast<size_t>(before) * row;
    const size_t head = static_cast<size_t>(shape[2]) * row;
    std::vector<char> grown(static_cast<size_t>(shape[1]) * head, 0);
    for (int64_t h = 0; before != 0 && h < shape[1]; ++h)
      std::memcpy(&grown[static_cast<size_t>(h) * head], &bytes[static_cast<size_t>(h) * old_head],
                  old_head);
    bytes.swap(grown);
  }
};

// One text: its caches, and how many tokens it has.
class Stream {
 public:
  Stream(const char* path, const char* kernels) {
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "generate", &env_));
    check(ort->CreateSessionOptions(&options_));
    if (kernels != nullptr) check(ort->RegisterCustomOpsLibrary_V2(options_, kernels));
    check(ort->CreateSession(env_, path, options_, &session_));
    check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_));
    read_metadata();
    describe_caches();
    vocab_size_ = shape_of(false, 0).second[2];
    reserve(1);
  }

  ~Stream() {
    ort->ReleaseMemoryInfo(memory_);
    ort->ReleaseSession(session_);
    ort->ReleaseSessionOptions(options_);
    ort->ReleaseEnv(env_);
  }

  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // Reads a text of any length, chunk by chunk; returns the logits of its last token.
  const std::vector<float>& read(const std::vector<int64_t>& tokens) {
    for (size_t start = 0; start < tokens.size(); start += chunk_size_) {
      const size_t end = std::min(tokens.size(), start + chunk_size_);
      step({tokens.begin() + static_cast<ptrdiff_t>(start),
            tokens.begin() + static_cast<ptrdiff_t>(end)});
    }
    return logits_;
  }

  // Reads 1 … chunk_size tokens and returns the logits of the last.
  const std::vector<float>& step(std::vector<int64_t> tokens) {
    const auto count = static_cast<int64_t>(tokens.size());
    reserve(length_ + count);
    std::vector<int64_t> past{length_}, fresh{count}, index{count - 1};
    logits_.resize(static_cast<size_t>(vocab_size_));

    OrtIoBinding* binding = nullptr;
    check(ort->CreateIoBinding(session_, &binding));
    const Owned<OrtIoBinding> owned(binding, ort->ReleaseIoBinding);
    bind_ids(binding, "input_ids", tokens, {1, count});
    bind_ids(binding, "past_length", past, {1});
    bind_ids(binding, "new_length", fresh, {1});
    bind_ids(binding, "logits_index", index, {1, 1});
    const auto logits = tensor(logits_.data(), logits_.size() * sizeof(float), {1, 1, vocab_size_},
                               ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    check(ort->BindOutput(binding, "logits", logits.get()));
    for (Cache& cache : caches_) {
      // Past and present are one buffer: the step writes its few slots and copies nothing.
      const auto value = tensor(cache.bytes.data(), cache.bytes.size(), cache.shape, cache.type);
      check(ort->BindInput(binding, cache.past.c_str(), value.get()));
      check(ort->BindOutput(binding, cache.present.c_str(), value.get()));
    }
    check(ort->RunWithBinding(session_, nullptr, binding));
    length_ += count;
    return logits_;
  }

 private:
  using Shape = std::pair<ONNXTensorElementDataType, std::vector<int64_t>>;

  // The essentials of lminf.json are in the graph's metadata_props, under "lminf.…".
  std::string property(OrtModelMetadata* metadata, const char* key) const {
    OrtAllocator* allocator = nullptr;
    check(ort->GetAllocatorWithDefaultOptions(&allocator));
    char* text = nullptr;
    check(ort->ModelMetadataLookupCustomMetadataMap(metadata, allocator, key, &text));
    if (text == nullptr) throw std::runtime_error(std::string("the graph has no property ") + key);
    std::string found = text;
    check(ort->AllocatorFree(allocator, text));
    return found;
  }

  void read_metadata() {
    OrtModelMetadata* metadata = nullptr;
    check(ort->SessionGetModelMetadata(session_, &metadata));
    const Owned<OrtModelMetadata> owned(metadata, ort->ReleaseModelMetadata);
    chunk_size_ = std::stoul(property(metadata, "lminf.chunk_size"));
    // A JSON list with one object for each layer; a program with a JSON parser uses that.
    const std::string layers = property(metadata, "lminf.layers"), key = "\"ring_capacity\":";
    for (size_t at = layers.find(key); at != std::string::npos; at = layers.find(key, at + 1))
      capacities_.push_back(std::stoll(layers.substr(at + key.size())));
  }

  std::string name_of_input(size_t index) const {
    OrtAllocator* allocator = nullptr;
    check(ort->GetAllocatorWithDefaultOptions(&allocator));
    char* text = nullptr;
    check(ort->SessionGetInputName(session_, index, allocator, &text));
    std::string name = text;
    check(ort->AllocatorFree(allocator, text));
    return name;
  }

  // Element type and dimensions of an input or output; dimensions left open are -1.
  Shape shape_of(bool input, size_t index) const {
    OrtTypeInfo* type = nullptr;
    check((input ? ort->SessionGetInputTypeInfo : ort->SessionGetOutputTypeInfo)(session_, index,
                                                                                 &type));
    const Owned<OrtTypeInfo> owned(type, ort->ReleaseTypeInfo);
    const OrtTensorTypeAndShapeInfo* info = nullptr;
    check(ort->CastTypeInfoToTensorInfo(type, &info));
    Shape found{};
    size_t rank = 0;
    check(ort->GetTensorElementType(info, &found.first));
    check(ort->GetDimensionsCount(info, &rank));
    found.second.resize(rank);
    check(ort->GetDimensions(info, found.second.data(), rank));
    return found;
  }

  void describe_caches() {
    size_t count = 0;
    check(ort->SessionGetInputCount(session_, &count));
    for (size_t index = 0; index < count; ++index) {
      const std::string name = name_of_input(index);
      if (name.compare(0, kPast.size(), kPast) != 0) continue;
      auto [type, shape] = shape_of(true, index);
      shape[0] = 1;
      const size_t layer = std::stoul(name.substr(kPast.size()));
      const int64_t capacity = shape[2] < 0 ? capacities_.at(layer) : 0;
      caches_.push_back({name, kPresent + name.substr(kPast.size()), type, shape, capacity, {}});
    }
  }

  // Lets every ring hold so many positions, or its full capacity, after which it wraps.
  void reserve(int64_t needed) {
    const int64_t full = *std::max_element(capacities_.begin(), capacities_.end());
    if (slots_ != 0 && (needed <= slots_ || slots_ >= full)) return;
    slots_ = std::max({kFirstSlots, 2 * slots_, needed});
    for (Cache& cache : caches_) cache.resize(slots_);
  }

  Owned<OrtValue> tensor(void* data, size_t bytes, const std::vector<int64_t>& shape,
                         ONNXTensorElementDataType type) const {
    OrtValue* value = nullptr;
    check(ort->CreateTensorWithDataAsOrtValue(memory_, data, bytes, shape.data(), shape.size(),
                                              type, &value));
    return {value, ort->ReleaseValue};
  }

  void bind_ids(OrtIoBinding* binding, const char* name, std::vector<int64_t>& ids,
                const std::vector<int64_t>& shape) const {
    const auto value = tensor(ids.data(), ids.size() * sizeof(int64_t), shape,
                              ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    check(ort->BindInput(binding, name, value.get()));
  }

  OrtEnv* env_ = nullptr;
  OrtSessionOptions* options_ = nullptr;
  OrtSession* session_ = nullptr;
  OrtMemoryInfo* memory_ = nullptr;
  std::vector<int64_t> capacities_;  // of the ring of each layer
  std::vector<Cache> caches_;
  std::vector<float> logits_;
  int64_t vocab_size_ = 0;
  int64_t length_ = 0;  // tokens read; it grows without end
  int64_t slots_ = 0;   // of every ring, while that is less than its capacity
  size_t chunk_size_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: generate BUNDLE/model.onnx NUM_TOKENS TOKEN_ID [TOKEN_ID ...]\n");
    return 2;
  }
  if (ort == nullptr) {
    std::fprintf(stderr, "error: this onnxruntime is older than the header\n");
    return 1;
  }
  try {
    Stream stream(argv[1], std::getenv("LMINF_KERNELS"));
    std::vector<int64_t> prompt;
    for (int i = 3; i < argc; ++i) prompt.push_back(std::stoll(argv[i]));
    const std::vector<float>* logits = &stream.read(prompt);
    for (long left = std::stol(argv[2]); left > 0; --left) {
      const auto best = std::max_element(logits->begin(), logits->end());
      const int64_t token = best - logits->begin();
      std::printf("%lld %.9g\n", static_cast<long long>(token), static_cast<double>(*best));
      logits = &stream.step({token});
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
