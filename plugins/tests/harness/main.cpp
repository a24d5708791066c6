// plugin_harness: plays TensorRT's part for liblminf_tensorrt.so, without any library of it.
//
//   plugin_harness --plugin LIB --case DIR [--device cpu|cuda] [--apart] [--graph] [--misaligned]
//
// Runs the case in DIR (see case.h) through the plugin's whole life, writes the outputs of each
// step beside it, and prints one line of JSON:
//   {"ok": true, "steps": 12, "workspace_bytes": [0, 4096], "aliases": [-1, 3, 4, 5, 6],
//    "caches_in_place": 48, "caches_apart": 0, "warnings": []}
//   {"ok": false, "stage": "createPlugin", "what": "refused", "messages": ["LambdaAttention: …"]}
// Exit status 0, 1 if the plugin failed, 2 if the harness could not run.

#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>

#include "life_cycle.h"

// The plugin asks the library its logger comes from, here this program, which release it is.
extern "C" __attribute__((visibility("default"))) std::int32_t getInferLibVersion() noexcept {
  return NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH;
}

namespace {

struct Arguments {
  std::string plugin;
  std::string folder;
  std::string device = "cpu";
  harness::RunOptions run;
};

Arguments parse(int count, char** words) {
  Arguments result;
  for (int index = 1; index < count; ++index) {
    const std::string word = words[index];
    const auto value = [&] {
      if (++index >= count) throw std::runtime_error(word + " needs a value");
      return std::string(words[index]);
    };
    if (word == "--plugin") {
      result.plugin = value();
    } else if (word == "--case") {
      result.folder = value();
    } else if (word == "--device") {
      result.device = value();
    } else if (word == "--apart") {
      result.run.apart = true;
    } else if (word == "--misaligned") {
      result.run.misaligned = true;
    } else if (word == "--graph") {
      result.run.graph = true;
    } else {
      throw std::runtime_error("unknown option " + word);
    }
  }
  if (result.plugin.empty() || result.folder.empty()) {
    throw std::runtime_error("--plugin LIB and --case DIR are needed");
  }
  return result;
}

std::string quoted(const std::string& text) {
  std::ostringstream out;
  out << '"';
  for (const char c : text) {
    if (c == '"' || c == '\\')
      out << '\\' << c;
    else if (static_cast<unsigned char>(c) < 0x20)
      out << ' ';
    else
      out << c;
  }
  out << '"';
  return out.str();
}

template <class Values, class Show>
std::string list(const Values& values, Show show) {
  std::ostringstream out;
  out << '[';
  const char* separator = "";
  for (const auto& value : values) {
    out << separator << show(value);
    separator = ", ";
  }
  out << ']';
  return out.str();
}

std::string failure(const std::string& stage, const std::string& what,
                    const harness::Logger& logger) {
  return "{\"ok\": false, \"stage\": " + quoted(stage) + ", \"what\": " + quoted(what) +
         ", \"messages\": " + list(logger.errors, quoted) + "}";
}

int play(const Arguments& arguments, harness::Logger& logger) {
  const harness::Case task = harness::readCase(arguments.folder);
  const auto device = harness::openDevice(arguments.device);
  const harness::Library library(arguments.plugin, logger);
  const harness::Plan plan = harness::build(library, task);
  harness::run(library, task, plan, *device, arguments.run);
  const auto number = [](auto value) { return std::to_string(value); };
  harness::require(logger.errors.empty(), "messages", "errors were logged in spite of success");
  std::cout << "{\"ok\": true, \"steps\": " << task.steps.size()
            << ", \"workspace_bytes\": " << list(plan.workspaceBytes, number)
            << ", \"aliases\": " << list(plan.aliases, number)
            << ", \"caches_in_place\": " << library.cachesInPlace()
            << ", \"caches_apart\": " << library.cachesApart()
            << ", \"warnings\": " << list(logger.warnings, quoted) << "}\n";
  return 0;
}

}  // namespace

int main(int count, char** words) {
  harness::Logger logger;
  try {
    return play(parse(count, words), logger);
  } catch (const harness::Failure& error) {
    std::cout << failure(error.stage, error.what(), logger) << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cout << failure("harness", error.what(), logger) << "\n";
    return 2;
  }
}
