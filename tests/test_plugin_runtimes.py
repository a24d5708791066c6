"""NVIDIA's own libraries load the plugin and make it, as far as they run without a GPU."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import onnx
import pytest

from lminf_export.engine.plugin import default_places
from lminf_export.export.engine_graph import write_engine_graph
from lminf_export.operator import contract
from tests.support.engine_graphs import request_of
from tests.support.kernel_build import shared_folder
from tests.support.plugin_build import emulated_plugin, needs_compiler, needs_headers
from tests.support.tensorrt_here import lean_folders, run_python
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel(dtype="float16", head_dim=64)

LOAD = """
import json
import numpy as np
import tensorrt_lean as trt
registry = trt.get_plugin_registry()
loaded = registry.load_library({plugin!r}) is not None
creator = registry.get_creator("LambdaAttention", "1", "lminf")
kept = []
def fields(**attributes):
    made = []
    for name, value in attributes.items():
        real = isinstance(value, float)
        kind = trt.PluginFieldType.FLOAT32 if real else trt.PluginFieldType.INT32
        kept.append(np.array([value], np.float32 if real else np.int32))
        made.append(trt.PluginField(name, kept[-1], kind))
    return trt.PluginFieldCollection(made)
good = dict(num_sink_tokens=3, window_size=13, distance_limit=13, rotary_dim=8,
            rotary_interleaved=0, scale=0.125, softcap=0.0)
kinds = {{}}
for phase in ("BUILD", "RUNTIME"):
    plugin = creator.create_plugin("layer", fields(**good), getattr(trt.TensorRTPhase, phase))
    kinds[phase] = []
    for name in ("CORE", "BUILD", "RUNTIME"):
        found = plugin.get_capability_interface(getattr(trt.PluginCapabilityType, name))
        kinds[phase].append([found.interface_info.kind, found.interface_info.major])
bad = fields(**(good | dict(window_size=0)))
bad = creator.create_plugin("layer", bad, trt.TensorRTPhase.BUILD)
print(json.dumps(dict(version=trt.__version__, loaded=loaded, kinds=kinds, bad=bad is None,
                      fields=[field.name for field in creator.field_names])))
"""

CAPABILITIES = [["PLUGIN_V3ONE_CORE", 1], ["PLUGIN_V3ONE_BUILD", 2], ["PLUGIN_V3ONE_RUNTIME", 1]]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return emulated_plugin(shared_folder(tmp_path_factory)).plugin


def check_load(lean, plugin):
    done = run_python(LOAD.format(plugin=str(plugin)), lean)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["loaded"]
    assert said["kinds"] == {"BUILD": CAPABILITIES, "RUNTIME": CAPABILITIES}
    assert said["fields"] == [
        *("num_sink_tokens", "window_size", "distance_limit", "rotary_dim", "rotary_interleaved"),
        *("scale", "softcap"),
    ]
    # A wrong attribute is refused in words, and the process lives.
    assert said["bad"]
    assert "LambdaAttention: window_size = 0: must be in 1" in done.stderr


@needs_headers
@needs_compiler
@lean_folders
def test_a_lean_runtime_loads_the_plugin_and_makes_it_in_both_phases(emulated, lean):
    check_load(lean, emulated)


@pytest.mark.skipif(
    not any(place.is_file() for place in default_places()),
    reason="the plugin with CUDA: no liblminf_tensorrt.so is built (cmake -S plugins)",
)
@lean_folders
def test_a_lean_runtime_loads_the_library_with_cuda_without_a_driver(lean):
    check_load(lean, next(place for place in default_places() if place.is_file()))


PARSE = """
import logging, sys
import tensorrt_rtx as trt
class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, text):
        print(severity.name, text, flush=True)
log = Log()
builder = trt.Builder(log)
assert builder.get_plugin_registry().load_library({plugin!r}) is not None
network = builder.create_network(0)
parser = trt.OnnxParser(network, log)
print("PARSED", parser.parse_from_file({graph!r}), flush=True)
"""


def parse_with_rtx(plugin, folder, tiny=TINY, **changes):
    """Parse the graph for the plugin with NVIDIA's current parser; returns what was said."""
    bundle = tiny.write(folder / "bundle")
    graph = bundle.path / "engine.onnx"
    request = request_of(tiny, bundle.path, onnx_path=graph, with_plugin=True)
    write_engine_graph(bundle.graph_path, request)
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in changes:
                attribute.i = changes[attribute.name]
    onnx.save(model, graph)
    done = run_python(PARSE.format(plugin=str(plugin), graph=str(graph)))
    return done.stdout + done.stderr


needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="NVIDIA's parser: tensorrt-rtx is not installed",
)


@needs_headers
@needs_compiler
@needs_rtx
@pytest.mark.parametrize("rings", [None, "int8"])
def test_nvidias_parser_maps_our_node_to_our_creator(emulated, tmp_path, rings):
    # It refuses to run plugins, and ends the process once it has made one: so in a child.
    said = parse_with_rtx(emulated, tmp_path, replace(TINY, kv_cache_dtype=rings))
    assert "plugin_namespace: lminf" in said
    assert "Plugin not found" not in said
    name = contract.op_type(int8_cache=rings is not None)
    assert f"Successfully created plugin: {name}\n" in said


@needs_headers
@needs_compiler
@needs_rtx
def test_the_creator_gets_the_nodes_attributes(emulated, tmp_path):
    said = parse_with_rtx(emulated, tmp_path, window_size=-3)
    assert "LambdaAttention: window_size = -3: must be in 1" in said
    assert "PARSED True" not in said
