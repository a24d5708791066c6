#include <algorithm>
#include <array>
#include <map>

#include "life_cycle.h"

namespace harness {
namespace {

using nvinfer1::Dims;
using nvinfer1::PluginTensorDesc;

bool sameShapes(const std::vector<Dims>& left, const std::vector<Dims>& right) {
  return left.size() == right.size() &&
         std::equal(left.begin(), left.end(), right.begin(), [](const Dims& a, const Dims& b) {
           return a.nbDims == b.nbDims && std::equal(a.d, a.d + a.nbDims, b.d);
         });
}

// An execution context: a clone of the plugin, its workspace, and the shapes it was told last.
struct Context {
  std::unique_ptr<nvinfer1::IPluginV3> plugin;
  std::unique_ptr<Buffer> workspace;
  std::vector<Dims> shapes;

  nvinfer1::IPluginV3OneRuntime& runtime() const {
    return static_cast<nvinfer1::IPluginV3OneRuntime&>(
        *plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
  }
};

class Runner {
 public:
  Runner(const Library& library, const Case& task, Device& device, const RunOptions& options)
      : library_(library), task_(task), device_(device), options_(options) {}

  void step(std::size_t number, Context& context) {
    const Step& step = task_.steps[number];
    describe(step);
    if (!sameShapes(step.shapes, context.shapes)) {
      require(context.runtime().onShapeChange(descs_.data(), task_.numInputs(),
                                              descs_.data() + task_.numInputs(),
                                              task_.numOutputs()) == 0,
              "onShapeChange", "step " + std::to_string(number) + " is refused");
      context.shapes = step.shapes;
    }
    load(number);
    enqueue(number, context);
    store(number);
    checkGuards(context);
  }

 private:
  void describe(const Step& step) {
    descs_.clear();
    for (std::int32_t place = 0; place < task_.numInputs() + task_.numOutputs(); ++place) {
      const std::int32_t from =
          place < task_.numInputs() ? place : shapeSource(place - task_.numInputs());
      Dims dims = step.shapes[static_cast<std::size_t>(from)];
      // Without sink tokens the past is one row for all streams, the present one for each.
      if (place >= task_.numInputs()) dims.d[0] = step.shapes[0].d[0];
      descs_.push_back({dims, task_.typeOf(place), nvinfer1::TensorFormat::kLINEAR, -1.0F});
    }
  }

  void load(std::size_t number) {
    for (std::int32_t input = 0; input < task_.numInputs(); ++input) {
      if (isCache(input) && number > 0) continue;  // the last step's present is this one's past
      const std::string name = kInputs[input].name;
      Buffer& buffer = place(inputs_, input, task_.bytesOf(input, descOf(input)));
      buffer.write(readBytes(task_.folder / (std::to_string(number) + "." + name + ".bin")));
    }
    for (std::int32_t output = 0; output < task_.numOutputs(); ++output) {
      Buffer& buffer =
          place(outputs_, output,
                task_.bytesOf(task_.numInputs() + output, descOf(task_.numInputs() + output)));
      buffer.poison();
    }
  }

  void enqueue(std::size_t number, Context& context) {
    std::array<const void*, lminf::kNumInt8CacheInputs> inputs{};
    std::array<void*, lminf::kNumInt8CacheOutputs> outputs{};
    for (std::int32_t input = 0; input < task_.numInputs(); ++input) {
      inputs[static_cast<std::size_t>(input)] = inputs_.at(input)->data();
    }
    if (options_.misaligned) inputs[0] = static_cast<const char*>(inputs[0]) + 2;
    for (std::int32_t output = 0; output < task_.numOutputs(); ++output) {
      Buffer& buffer = bufferOf(output);
      outputs[static_cast<std::size_t>(output)] = buffer.data();
    }
    std::array<const void*, 2 * lminf::kNumInt8CacheOutputs> seen{};
    std::uint64_t count = 0;
    library_.recordCaches(seen.data(), seen.size() / 2, &count);
    if (options_.graph) device_.beginCapture();
    const std::int32_t status =
        context.runtime().enqueue(descs_.data(), descs_.data() + task_.numInputs(), inputs.data(),
                                  outputs.data(), context.workspace->data(), device_.stream());
    if (options_.graph) device_.endCaptureAndRun();
    device_.synchronize();
    library_.recordCaches(nullptr, 0, nullptr);
    require(status == 0, "enqueue", "step " + std::to_string(number) + " is refused");
    checkRecord(seen.data(), count, inputs.data(), outputs.data());
  }

  // What the library recorded are the caches that it was given.
  void checkRecord(const void* const* seen, std::uint64_t count, const void* const* inputs,
                   void* const* outputs) const {
    std::uint64_t wanted = 0;
    for (std::int32_t output = 0; output < task_.numOutputs(); ++output) {
      if (output == lminf::kOutput || (isSinkOutput(output) && !hasSinks())) continue;
      require(wanted < count && seen[2 * wanted] == inputs[lminf::kUpdatedInput[output]] &&
                  seen[2 * wanted + 1] == outputs[output],
              "record", std::string(kOutputs[output].name) + " is recorded at another address");
      ++wanted;
    }
    require(count == wanted, "record", "other caches are recorded");
  }

  // Writes every output, and makes what is present the next step's past.
  void store(std::size_t number) {
    for (std::int32_t output = 0; output < task_.numOutputs(); ++output) {
      if (isSinkOutput(output) && !hasSinks()) continue;
      Buffer& buffer = bufferOf(output);
      const std::string name = kOutputs[output].name;
      writeBytes(task_.folder / (std::to_string(number) + "." + name + ".bin"), buffer.read());
      if (output != lminf::kOutput && !inPlace(output)) {
        std::swap(inputs_.at(lminf::kUpdatedInput[output]), outputs_.at(output));
      }
    }
  }

  void checkGuards(const Context& context) const {
    for (const auto& [input, buffer] : inputs_) {
      require(buffer->guardsIntact(), "memory", "written beyond input " + std::to_string(input));
    }
    for (const auto& [output, buffer] : outputs_) {
      require(buffer->guardsIntact(), "memory", "written beyond output " + std::to_string(output));
    }
    require(context.workspace->guardsIntact(), "memory", "written beyond the workspace");
  }

  bool hasSinks() const { return task_.integers.at("num_sink_tokens") > 0; }
  bool isCache(std::int32_t input) const {
    const auto* end = lminf::kUpdatedInput + task_.numOutputs();
    return std::find(lminf::kUpdatedInput, end, input) != end;
  }
  bool inPlace(std::int32_t output) const {
    return output != lminf::kOutput && !options_.apart && (!isSinkOutput(output) || hasSinks());
  }
  Buffer& bufferOf(std::int32_t output) const {
    return inPlace(output) ? *inputs_.at(lminf::kUpdatedInput[output]) : *outputs_.at(output);
  }
  const Dims& descOf(std::int32_t place) const {
    return descs_[static_cast<std::size_t>(place)].dims;
  }
  Buffer& place(std::map<std::int32_t, std::unique_ptr<Buffer>>& buffers, std::int32_t which,
                std::size_t bytes) {
    std::unique_ptr<Buffer>& buffer = buffers[which];
    if (buffer == nullptr || buffer->size() != bytes) {
      buffer = std::make_unique<Buffer>(device_, bytes);
    }
    return *buffer;
  }

  const Library& library_;
  const Case& task_;
  Device& device_;
  const RunOptions options_;
  std::vector<PluginTensorDesc> descs_;
  std::map<std::int32_t, std::unique_ptr<Buffer>> inputs_;
  std::map<std::int32_t, std::unique_ptr<Buffer>> outputs_;
};

}  // namespace

void run(const Library& library, const Case& task, const Plan& plan, Device& device,
         const RunOptions& options) {
  const nvinfer1::PluginFieldCollection fields{static_cast<std::int32_t>(plan.fields.size()),
                                               plan.fields.data()};
  std::unique_ptr<nvinfer1::IPluginV3> engine(
      library.creator(task.name())
          .createPlugin("layer", &fields, nvinfer1::TensorRTPhase::kRUNTIME));
  require(engine != nullptr, "createPlugin", "its own serialised fields are refused");
  ResourceContext resources;
  std::vector<Context> contexts;
  for (const std::size_t bytes : plan.workspaceBytes) {
    auto* runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
        engine->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
    Context context;
    context.plugin.reset(runtime->attachToContext(&resources));
    require(context.plugin != nullptr, "attachToContext", "failed");
    context.workspace = std::make_unique<Buffer>(device, std::max<std::size_t>(bytes, 1));
    contexts.push_back(std::move(context));
  }
  // Contexts outlive the object they were cloned from.
  engine.reset();
  Runner runner(library, task, device, options);
  for (std::size_t number = 0; number < task.steps.size(); ++number) {
    runner.step(number, contexts[task.steps[number].profile]);
  }
}

}  // namespace harness
