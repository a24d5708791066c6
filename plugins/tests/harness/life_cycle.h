// TensorRT's side of a plugin's life, from the library's exports to the last step.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "case.h"
#include "doubles.h"
#include "memory.h"

namespace harness {

// A stage in which the plugin did not do what its contract says.
class Failure : public std::runtime_error {
 public:
  Failure(std::string stage, const std::string& what)
      : std::runtime_error(what), stage(std::move(stage)) {}

  std::string stage;
};

void require(bool holds, const std::string& stage, const std::string& what);

// A loaded library and its creators.
class Library {
 public:
  Library(const std::string& path, Logger& logger);
  ~Library();
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  nvinfer1::IPluginCreatorV3One& creator(const char* name) const;

  // Of all steps in this process: caches whose past and present had one address, and two.
  std::uint64_t cachesInPlace() const { return cachesInPlace_(); }
  std::uint64_t cachesApart() const { return cachesApart_(); }
  // Lets the library write the addresses of the caches that this thread enqueues; null ends it.
  void recordCaches(const void** addresses, std::uint64_t room, std::uint64_t* count) const {
    recordCaches_(addresses, room, count);
  }

 private:
  LoggerFinder finder_;
  void* handle_;
  std::vector<nvinfer1::IPluginCreatorV3One*> creators_;
  std::uint64_t (*cachesInPlace_)();
  std::uint64_t (*cachesApart_)();
  void (*recordCaches_)(const void**, std::uint64_t, std::uint64_t*);
};

// What survives the build: the serialised fields, and for each profile the workspace.
struct Plan {
  std::vector<nvinfer1::PluginField> fields;
  std::vector<std::unique_ptr<std::vector<char>>> data;
  std::vector<std::unique_ptr<std::string>> names;
  std::vector<std::size_t> workspaceBytes;
  std::vector<std::int32_t> aliases;  // for each output its input, or -1
};

// The build phase: create, shapes, types, formats, configure, workspace, clone, serialise.
Plan build(const Library& library, const Case& task);

struct RunOptions {
  bool apart = false;       // past and present in two buffers
  bool misaligned = false;  // the query begins two bytes late
  bool graph = false;       // record each step in a CUDA graph and launch that
};

// The runtime phase: create from the plan, one clone for each profile's context, all steps.
// Writes FOLDER/STEP.OUTPUT.bin for every step.
void run(const Library& library, const Case& task, const Plan& plan, Device& device,
         const RunOptions& options);

}  // namespace harness
