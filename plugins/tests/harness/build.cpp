#include <dlfcn.h>

#include <algorithm>
#include <cstring>

#include "life_cycle.h"

namespace harness {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

void require(bool holds, const std::string& stage, const std::string& what) {
  if (!holds) throw Failure(stage, what);
}

namespace {

template <class Function>
Function symbol(void* handle, const char* name) {
  void* found = dlsym(handle, name);
  require(found != nullptr, "load", std::string("the library does not export ") + name);
  return reinterpret_cast<Function>(found);
}

// Which axes of an input are the batch and the new tokens; -1 for none. A batch of one row that
// all streams share is a constant.
struct OpenAxes {
  std::int32_t batch;
  std::int32_t sequence;
};

OpenAxes openAxes(std::int32_t input, const Case& task) {
  const lminf::Operand& operand = kInputs[input];
  const auto axisOf = [&](lminf::Letter letter) {
    const auto* end = operand.shape + operand.rank;
    const auto* found = std::find(operand.shape, end, letter);
    return found == end ? -1 : static_cast<std::int32_t>(found - operand.shape);
  };
  const bool constantSinks = (input == lminf::kPastSinkKey || input == lminf::kPastSinkValue) &&
                             task.integers.at("num_sink_tokens") == 0;
  const bool constantRows =
      (input == lminf::kCos || input == lminf::kSin) && task.integers.at("rotary_dim") == 0;
  if (constantSinks || constantRows) return {-1, -1};
  return {axisOf(lminf::Letter::kB), axisOf(lminf::Letter::kS)};
}

Dims shapeIn(const Case& task, std::int32_t input, std::int64_t batch, std::int64_t sequence) {
  Dims dims = task.steps.front().shapes[static_cast<std::size_t>(input)];
  const OpenAxes open = openAxes(input, task);
  if (open.batch >= 0) dims.d[open.batch] = batch;
  if (open.sequence >= 0) dims.d[open.sequence] = sequence;
  return dims;
}

Dims outputShape(const std::vector<Dims>& inputs, std::int32_t output) {
  return inputs[static_cast<std::size_t>(shapeSource(output))];
}

PluginTensorDesc describe(const Case& task, std::int32_t place, const Dims& dims) {
  return {dims, task.typeOf(place), TensorFormat::kLINEAR, -1.0F};
}

// The attributes as NVIDIA's parser hands them over: 32-bit integers and floats.
class NodeFields {
 public:
  explicit NodeFields(const Case& task) : task_(task) {
    for (const auto& [name, value] : task_.integers) {
      fields_.emplace_back(name.c_str(), &value, PluginFieldType::kINT32, 1);
    }
    for (const auto& [name, value] : task_.floats) {
      fields_.emplace_back(name.c_str(), &value, PluginFieldType::kFLOAT32, 1);
    }
    collection_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
  }
  const PluginFieldCollection* get() const { return &collection_; }

 private:
  const Case& task_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

void checkIdentity(nvinfer1::IPluginV3& plugin, const Case& task) {
  auto* core = static_cast<nvinfer1::IPluginV3OneCore*>(
      plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kCORE));
  require(core != nullptr, "capabilities", "there is no core");
  require(std::strcmp(core->getPluginName(), task.name()) == 0 &&
              std::strcmp(core->getPluginVersion(), "1") == 0 &&
              std::strcmp(core->getPluginNamespace(), lminf::kDomain) == 0,
          "capabilities", "name, version or namespace differ from the creator's");
}

nvinfer1::IPluginV3OneBuildV2& buildCapability(nvinfer1::IPluginV3& plugin) {
  auto* capability = plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD);
  require(capability != nullptr, "capabilities", "there is no build capability");
  const nvinfer1::InterfaceInfo info = capability->getInterfaceInfo();
  require(std::strcmp(info.kind, "PLUGIN_V3ONE_BUILD") == 0 && info.major == 2, "capabilities",
          "the build capability cannot alias");
  return static_cast<nvinfer1::IPluginV3OneBuildV2&>(*capability);
}

void checkTypes(nvinfer1::IPluginV3OneBuildV2& builder, const Case& task) {
  std::vector<DataType> inputs;
  inputs.reserve(static_cast<std::size_t>(task.numInputs()));
  for (std::int32_t input = 0; input < task.numInputs(); ++input)
    inputs.push_back(task.typeOf(input));
  std::vector<DataType> outputs(static_cast<std::size_t>(task.numOutputs()), DataType::kBOOL);
  require(builder.getOutputDataTypes(outputs.data(), task.numOutputs(), inputs.data(),
                                     task.numInputs()) == 0,
          "types", "refused");
  for (std::int32_t output = 0; output < task.numOutputs(); ++output) {
    require(outputs[static_cast<std::size_t>(output)] == task.typeOf(task.numInputs() + output),
            "types", "an output has another");
  }
}

void checkShapes(nvinfer1::IPluginV3OneBuildV2& builder, const Case& task) {
  ExprBuilder exprs;
  const nvinfer1::IDimensionExpr* batch = exprs.constant(-1);
  const nvinfer1::IDimensionExpr* sequence = exprs.constant(-1);
  std::vector<DimsExprs> inputs(static_cast<std::size_t>(task.numInputs()));
  for (std::int32_t input = 0; input < task.numInputs(); ++input) {
    const Dims& dims = task.steps.front().shapes[static_cast<std::size_t>(input)];
    const OpenAxes open = openAxes(input, task);
    DimsExprs& expr = inputs[static_cast<std::size_t>(input)];
    expr.nbDims = dims.nbDims;
    for (std::int32_t axis = 0; axis < dims.nbDims; ++axis) {
      expr.d[axis] = axis == open.batch      ? batch
                     : axis == open.sequence ? sequence
                                             : exprs.constant(dims.d[axis]);
    }
  }
  std::vector<DimsExprs> outputs(static_cast<std::size_t>(task.numOutputs()));
  require(builder.getOutputShapes(inputs.data(), task.numInputs(), nullptr, 0, outputs.data(),
                                  task.numOutputs(), exprs) == 0,
          "shapes", "refused");
  for (std::size_t output = 0; output < outputs.size(); ++output) {
    const auto source = shapeSource(static_cast<std::int32_t>(output));
    const DimsExprs& wanted = inputs[static_cast<std::size_t>(source)];
    require(outputs[output].nbDims == wanted.nbDims, "shapes", "an output has another rank");
    for (std::int32_t axis = 1; axis < wanted.nbDims; ++axis) {
      require(outputs[output].d[axis] == wanted.d[axis], "shapes", "an output has another shape");
    }
    require(outputs[output].d[0] == batch, "shapes", "an output has another batch");
  }
}

std::vector<DynamicPluginTensorDesc> rangesOf(const Case& task, const Profile& profile) {
  std::vector<DynamicPluginTensorDesc> all;
  std::vector<Dims> shapes[3];
  for (int which = 0; which < 3; ++which) {
    for (std::int32_t input = 0; input < task.numInputs(); ++input) {
      shapes[which].push_back(shapeIn(task, input, profile.batch[which], profile.sequence[which]));
    }
  }
  for (std::int32_t place = 0; place < task.numInputs() + task.numOutputs(); ++place) {
    const auto pick = [&](int which) {
      return place < task.numInputs() ? shapes[which][static_cast<std::size_t>(place)]
                                      : outputShape(shapes[which], place - task.numInputs());
    };
    Dims open = pick(0);
    for (std::int32_t axis = 0; axis < open.nbDims; ++axis) {
      if (pick(0).d[axis] != pick(2).d[axis]) open.d[axis] = -1;
    }
    DynamicPluginTensorDesc desc{};
    desc.desc = describe(task, place, open);
    desc.min = pick(0);
    desc.opt = pick(1);
    desc.max = pick(2);
    all.push_back(desc);
  }
  return all;
}

// The right combination is accepted; one wrong type or format, wherever it stands, is not.
void checkFormats(nvinfer1::IPluginV3OneBuildV2& builder, const Case& task,
                  const std::vector<DynamicPluginTensorDesc>& right) {
  for (std::int32_t place = 0; place < task.numInputs() + task.numOutputs(); ++place) {
    const auto supports = [&](const std::vector<DynamicPluginTensorDesc>& all) {
      return builder.supportsFormatCombination(place, all.data(), task.numInputs(),
                                               task.numOutputs());
    };
    const std::string where = "place " + std::to_string(place);
    require(supports(right), "formats", where + ": the right one is refused");
    auto wrong = right;
    for (const DataType type : {DataType::kINT8, DataType::kINT32}) {
      if (type == task.typeOf(place)) continue;
      wrong[static_cast<std::size_t>(place)].desc.type = type;
      require(!supports(wrong), "formats", where + ": another type is accepted");
    }
    wrong = right;
    wrong[static_cast<std::size_t>(place)].desc.format = TensorFormat::kCHW32;
    require(!supports(wrong), "formats", where + ": a vectorised format is accepted");
  }
}

void checkAliases(nvinfer1::IPluginV3OneBuildV2& builder, const Case& task, Plan& plan) {
  const bool sinks = task.integers.at("num_sink_tokens") > 0;
  std::vector<std::int32_t> wanted{-1, 3, 4, sinks ? 5 : -1, sinks ? 6 : -1};
  if (task.int8Rings) wanted.insert(wanted.end(), {17, 18});
  for (std::int32_t output = 0; output < task.numOutputs(); ++output) {
    plan.aliases.push_back(builder.getAliasedInput(output));
  }
  require(plan.aliases == wanted, "aliases", "not those of the caches");
}

// Serialised fields are copied: the object they point into does not outlive the build.
void serialize(nvinfer1::IPluginV3& plugin, Plan& plan) {
  auto* runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
      plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
  require(runtime != nullptr, "capabilities", "there is no runtime");
  const PluginFieldCollection* fields = runtime->getFieldsToSerialize();
  require(fields != nullptr && fields->nbFields > 0, "serialise", "no fields");
  for (std::int32_t index = 0; index < fields->nbFields; ++index) {
    const PluginField& field = fields->fields[index];
    const std::size_t size = field.type == PluginFieldType::kINT64 ? 8 : 4;
    const char* bytes = static_cast<const char*>(field.data);
    plan.data.push_back(std::make_unique<std::vector<char>>(
        bytes, bytes + size * static_cast<std::size_t>(field.length)));
    plan.names.push_back(std::make_unique<std::string>(field.name));
    plan.fields.emplace_back(plan.names.back()->c_str(), plan.data.back()->data(), field.type,
                             field.length);
  }
}

// What IBuilder does with each profile: configure, ask for workspace, and try the usual shapes.
void prepareProfile(nvinfer1::IPluginV3& plugin, const Case& task, const Profile& profile,
                    Plan& plan) {
  auto ranges = rangesOf(task, profile);
  const DynamicPluginTensorDesc* inputs = ranges.data();
  const DynamicPluginTensorDesc* outputs = ranges.data() + task.numInputs();
  auto& builder = buildCapability(plugin);
  checkFormats(builder, task, ranges);
  require(builder.configurePlugin(inputs, task.numInputs(), outputs, task.numOutputs()) == 0,
          "configure", "refused");
  plan.workspaceBytes.push_back(
      builder.getWorkspaceSize(inputs, task.numInputs(), outputs, task.numOutputs()));
  std::unique_ptr<nvinfer1::IPluginV3> clone(plugin.clone());
  require(clone != nullptr, "clone", "failed while building");
  std::vector<PluginTensorDesc> usual;
  for (const DynamicPluginTensorDesc& desc : ranges) {
    usual.push_back(desc.desc);
    usual.back().dims = desc.opt;
  }
  auto* runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
      clone->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
  require(runtime->setTactic(0) == 0, "tactic", "the default one is refused");
  require(runtime->onShapeChange(usual.data(), task.numInputs(), usual.data() + task.numInputs(),
                                 task.numOutputs()) == 0,
          "onShapeChange", "refused while building");
}

}  // namespace

Library::Library(const std::string& path, Logger& logger)
    : finder_(logger), handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)),
      cachesInPlace_(nullptr), cachesApart_(nullptr), recordCaches_(nullptr) {
  if (handle_ == nullptr) throw Failure("load", dlerror());
  symbol<void (*)(nvinfer1::ILoggerFinder*)>(handle_, "setLoggerFinder")(&finder_);
  using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(std::int32_t&);
  std::int32_t count = 0;
  auto* const* creators = symbol<GetCreators>(handle_, "getCreators")(count);
  require(count == 2 && creators != nullptr, "load", "two creators were expected");
  for (std::int32_t index = 0; index < count; ++index) {
    require(std::strcmp(creators[index]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0,
            "load", "a creator is of another kind");
    creators_.push_back(static_cast<nvinfer1::IPluginCreatorV3One*>(creators[index]));
  }
  cachesInPlace_ = symbol<decltype(cachesInPlace_)>(handle_, "lminfCachesInPlace");
  cachesApart_ = symbol<decltype(cachesApart_)>(handle_, "lminfCachesApart");
  recordCaches_ = symbol<decltype(recordCaches_)>(handle_, "lminfRecordCaches");
}

nvinfer1::IPluginCreatorV3One& Library::creator(const char* name) const {
  for (nvinfer1::IPluginCreatorV3One* creator : creators_) {
    if (std::strcmp(creator->getPluginName(), name) == 0) return *creator;
  }
  throw Failure("load", std::string("no creator has the name ") + name);
}

Library::~Library() { dlclose(handle_); }

Plan build(const Library& library, const Case& task) {
  Plan plan;
  require(library.creator(task.name()).getFieldNames()->nbFields ==
              static_cast<std::int32_t>(task.integers.size() + task.floats.size()),
          "fields", "the creator looks for another number of attributes");
  const NodeFields fields(task);
  std::unique_ptr<nvinfer1::IPluginV3> plugin(
      library.creator(task.name())
          .createPlugin("layer", fields.get(), nvinfer1::TensorRTPhase::kBUILD));
  require(plugin != nullptr, "createPlugin", "refused");
  checkIdentity(*plugin, task);
  auto& builder = buildCapability(*plugin);
  require(builder.getNbOutputs() == task.numOutputs(), "outputs", "another number of them");
  checkTypes(builder, task);
  checkShapes(builder, task);
  checkAliases(builder, task, plan);
  for (const Profile& profile : task.profiles) prepareProfile(*plugin, task, profile, plan);
  serialize(*plugin, plan);
  return plan;
}

}  // namespace harness
