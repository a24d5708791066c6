"""A recording double of TensorRT's builder, with no name that the real bindings lack."""

from __future__ import annotations

import enum
from types import SimpleNamespace

import onnx

from lminf_export.engine.options import EngineOptions
from tests.support.engine_graphs import request_of
from tests.support.tensorrt_doubles import IPluginRegistry, Severity
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel(sliding_window=5, dtype="float16", head_dim=64)


def names(title, *members):
    return enum.IntEnum(title, [(name, index) for index, name in enumerate(members)])


class ILogger:
    Severity = Severity


class INetworkDefinition:
    """What a parser would make of the graph: its borders, and a layer for every node."""

    def __init__(self, trt):
        self._trt, self._inputs, self._layers = trt, [], []

    @property
    def num_inputs(self):
        return len(self._inputs)

    @property
    def num_layers(self):
        return len(self._layers)

    def get_input(self, index):
        return self._inputs[index]

    def get_layer(self, index):
        return self._layers[index]


class IPluginV3Layer:
    def __init__(self, kind, inputs, outputs):
        self.type = kind
        self._inputs, self._outputs = inputs, outputs

    @property
    def num_inputs(self):
        return len(self._inputs)

    @property
    def num_outputs(self):
        return len(self._outputs)

    def get_input(self, index):
        return SimpleNamespace(name=self._inputs[index])

    def get_output(self, index):
        return SimpleNamespace(name=self._outputs[index])


class OnnxParser:
    num_errors = 0

    def __init__(self, network, logger):
        self._network = network

    def parse_from_file(self, model):
        trt, graph = self._network._trt, onnx.load(model, load_external_data=False).graph
        kinds = {1: "FLOAT", 7: "INT64", 10: "HALF"}
        for value in graph.input:
            dtype = trt.DataType[kinds[value.type.tensor_type.elem_type]]
            self._network._inputs.append(SimpleNamespace(name=value.name, dtype=dtype))
        for node in graph.node:
            kind = "PLUGIN_V3" if node.domain == "lminf" and trt.takes_nodes else "SHAPE"
            layer = IPluginV3Layer(trt.LayerType[kind], list(node.input), list(node.output))
            self._network._layers.append(layer)
        return True


class ITimingCache:
    def __init__(self, content):
        self._content = content

    def serialize(self):
        return self._content + b"+timed"


class IBuilderConfig:
    def __init__(self):
        self._told = []
        self._accepts = True
        self.progress_monitor = None
        self.plugins_to_serialize = []
        self.builder_optimization_level = 3

    def set_preview_feature(self, feature, enable):
        self._told.append(("preview", feature.name, enable))

    def set_memory_pool_limit(self, pool, pool_size):
        self._told.append(("pool", pool.name, pool_size))

    def clear_flag(self, flag):
        self._told.append(("clear", flag.name))

    def add_optimization_profile(self, profile):
        self._told.append(("profile", profile))

    def create_timing_cache(self, serialized_timing_cache):
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        return cache._content != b"of another GPU"


class IOptimizationProfile:
    def __init__(self):
        self._shapes = {}

    def set_shape(self, input, min, opt, max):
        self._shapes[input] = (min, opt, max)


class Builder:
    def __init__(self, logger):
        self._registry = IPluginRegistry(logger.log)

    def get_plugin_registry(self):
        return self._registry

    def create_network(self, flags):
        self._flags = flags
        return INetworkDefinition(type(self)._trt)

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        return b"a plan"


DOUBLES = (
    *(Builder, IBuilderConfig, INetworkDefinition, IPluginV3Layer, OnnxParser, ITimingCache),
    *(IOptimizationProfile, IPluginRegistry),
)


def tensorrt_double(*, strongly_typed=True, aliases=True, takes_nodes=True):
    """A `tensorrt` of 10.3 or 11, whose enumerations have other numbers than the real ones."""
    flags = ("EXPLICIT_BATCH", "STRONGLY_TYPED") if strongly_typed else ("EXPLICIT_BATCH",)
    features = ("ALIASED_PLUGIN_IO_10_03",) if aliases else ("PROFILE_SHARING_0806",)
    trt = SimpleNamespace(
        __name__="tensorrt",
        __version__="10.3.0",
        takes_nodes=takes_nodes,
        ILogger=ILogger,
        IProgressMonitor=type("IProgressMonitor", (), {}),
        NetworkDefinitionCreationFlag=names("NetworkDefinitionCreationFlag", *flags),
        PreviewFeature=names("PreviewFeature", "X", *features),
        BuilderFlag=names("BuilderFlag", "TF32"),
        MemoryPoolType=names("MemoryPoolType", "TACTIC_DRAM", "WORKSPACE"),
        LayerType=names("LayerType", "SHAPE", "PLUGIN_V3"),
        DataType=names("DataType", "HALF", "FLOAT", "INT64", "BF16"),
        OnnxParser=OnnxParser,
    )
    trt.Builder = type("Builder", (Builder,), {"_trt": trt})
    return trt


def written_here(folder):
    """For the real bindings' process: a request, its paths never read."""
    options = EngineOptions(workspace=4096, builder_optimization_level=2, embed_plugin=True)
    changes = {"with_plugin": True, "plugin_path": folder / "lib.so", "options": options}
    return request_of(TINY, folder, **changes)
