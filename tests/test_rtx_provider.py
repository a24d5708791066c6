"""Why onnxruntime's provider of TensorRT for RTX is not offered: it refuses the exported graph.

docs/engines.md says so; a parser that takes it would make that page wrong, and the provider
worth another look.
"""

from __future__ import annotations

import json

import onnx
import onnx.inliner
import pytest

from lminf_export.export.engine_graph import write_engine_graph
from tests.support.engine_graphs import request_of
from tests.support.rtx import needs_rtx
from tests.support.tensorrt_here import run_python
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel(dtype="float16", head_dim=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return TINY.write(tmp_path_factory.mktemp("rtx")).path


PARSE = """
import json
import tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
builder = trt.Builder(logger)
first, second = builder.create_network(0), builder.create_network(0)
parser, asked = trt.OnnxParser(first, logger), trt.OnnxParser(second, logger)
takes = parser.parse_from_file({path!r})
errors = [parser.get_error(index) for index in range(parser.num_errors)]
asked.supports_model_v2(open({path!r}, "rb").read(), {path!r})
subgraphs = [asked.is_subgraph_supported(index) for index in range(asked.num_subgraphs)]
print(json.dumps([takes, subgraphs, [[error.node_operator(), error.desc()] for error in errors]]))
"""


def parsed(path):
    """Whether NVIDIA's parser takes a graph, its subgraphs that run there, and the refusals."""
    done = run_python(PARSE.format(path=str(path)))
    assert done.returncode == 0, done.stderr[-500:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_rtx
@pytest.mark.parametrize("inlined", [False, True])
def test_the_exported_graph_is_refused_for_its_circular_updates(folder, inlined):
    path = folder / "model.onnx"
    if inlined:  # as onnxruntime inlines the function before it asks a provider
        model = onnx.load(path, load_external_data=False)
        path = folder / "inlined.onnx"
        onnx.save(onnx.inliner.inline_local_functions(model), path)
    takes, subgraphs, refusals = parsed(path)
    assert not takes
    assert not any(subgraphs)
    operator, words = refusals[0]
    assert operator == "TensorScatter"
    assert "Only linear mode is supported for now, got circular" in words


@needs_rtx
def test_the_graph_that_our_builder_prepares_is_taken_as_a_whole(folder):
    request = request_of(TINY, folder, onnx_path=folder / "ready.onnx")
    write_engine_graph(folder / "model.onnx", request)
    takes, subgraphs, refusals = parsed(folder / "ready.onnx")
    assert [takes, subgraphs, refusals] == [True, [True], []]
