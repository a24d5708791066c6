"""What stands around attention: the head, caches that go on, steps of any size, branches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import lminf_export
from lminf_export.errors import ExportError, ModelError
from lminf_export.export.options import ExportOptions
from lminf_export.rewriting.run import prepare, rewrite
from tests.support.foreign_attention import group_query, tables, total_lengths
from tests.support.foreign_decoders import (
    MICROSOFT,
    VOCABULARY,
    WIDTH,
    Attend,
    Graph,
    Original,
    Spec,
    decoder,
)
from tests.support.foreign_plain import Plain

# Steps may take all of the check's tokens at once.
SETTINGS: dict[str, Any] = {"window_size": 96, "num_sink_tokens": 3, "chunk_size": 64}
CLOSE = 2e-5
IDS = np.random.default_rng(3).integers(0, VOCABULARY, 31)
PLAIN = Spec()
TWO = replace(PLAIN, layers=2)


def written(folder: Path, graph: Graph, attend: Attend) -> Path:
    decoder(graph, attend)
    path = folder / "model.onnx"
    onnx.save(graph.model(), path)
    return path


class Ended(Graph):
    """A decoder whose output is something made of its logits."""

    end: Callable[[Graph, str], str]

    def output(self, name: str, value: str, kind: int, shape: list[Any] | None) -> None:
        value = type(self).end(self, value) if name == "logits" else value
        super().output(name, value, kind, shape)


def hidden(graph: Graph, logits: str) -> str:
    """Return what the head multiplies."""
    return str(next(node.input[0] for node in graph.nodes if logits in node.output))


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32) / 10


def branch(graph: Graph, logits: str) -> str:
    """Return the logits out of a branch that only hands them on."""
    branches = {
        name: helper.make_graph(
            [helper.make_node(*node)], name, [], [helper.make_tensor_value_info(name, 1, None)]
        )
        for name, node in {
            "then_branch": ("Identity", [logits], ["then_branch"]),
            "else_branch": ("Neg", [logits], ["else_branch"]),
        }.items()
    }
    found = helper.make_node("If", [graph.array(True, np.bool_)], ["branched"], **branches)
    graph.nodes.append(found)
    return "branched"


ENDS: dict[str, Callable[[Graph, str], str]] = {
    "two-heads": lambda g, x: g.Add(
        g.MatMul(g.Mul(hidden(g, x), g.array(2.0)), g.array(numbers(WIDTH, VOCABULARY))), x
    ),
    "gated": lambda g, x: g.Mul(x, g.Sigmoid(g.MatMul(hidden(g, x), g.array(numbers(WIDTH, 1))))),
    "biased-by-token": lambda g, x: g.Add(
        x, g.Gather(g.array(numbers(VOCABULARY, 1)), "input_ids")
    ),
    "last-row-behind": lambda g, x: g.Gather(x, g.ints(-1), axis=1),
    "branch": branch,
}


@pytest.mark.parametrize("name", ENDS)
def test_logits_of_chosen_rows_whatever_follows_the_head(name: str, tmp_path: Path) -> None:
    kind = type("Kind", (Ended,), {"end": staticmethod(ENDS[name])})
    path = written(tmp_path, kind(PLAIN), Plain())
    model = lminf_export.load(rewrite(path, tmp_path / "out", **SETTINGS).path)
    wanted = Original(path).step(IDS)[-1]
    state = model.new_state()
    model.forward(IDS[None, :20], state, logits="last")
    found = model.forward(IDS[None, 20:], state, logits="last")
    assert np.abs(found[0, -1] - wanted).max() <= CLOSE * np.ptp(wanted)


class SwappedPresents(Plain):
    """Each layer's new keys and values go on as the other's."""

    def _cached(self, graph: Graph, layer: int, kind: str, new: str) -> str:
        found = graph.Concat(graph.past(layer, kind), new, axis=2)
        graph.present(1 - layer, kind, found)
        return str(found)


@dataclass(frozen=True)
class Shifted(Plain):
    """Attention to whose result that of the token before is added, within a step."""

    def __call__(self, graph: Graph, query: str, key: str, value: str, layer: int) -> str:
        found = super().__call__(graph, query, key, value, layer)
        length = graph.array([0, 1, 0, 0, 0, 0], np.int64)
        before = graph.Slice(graph.Pad(found, length), graph.ints(0), graph.ints(-1), graph.ints(1))
        return str(graph.Add(found, before))


def weaker_values(graph: Graph, query: str, key: str, value: str, layer: int) -> str:
    """GroupQueryAttention whose values are less in the cache that goes on."""
    output, *present = graph.GroupQueryAttention(
        *(query, key, value, graph.past(layer, "key"), graph.past(layer, "value")),
        *total_lengths(graph, "mask"),
        *tables(graph),
        outputs=3,
        domain=MICROSOFT,
        num_heads=graph.spec.heads,
        kv_num_heads=graph.spec.kv_heads,
        do_rotary=1,
    )
    graph.present(layer, "key", present[0])
    graph.present(layer, "value", graph.Mul(present[1], graph.array(0.9)))
    return str(output)


STEPS: dict[str, tuple[Spec, Attend, str]] = {
    "presents-of-another-layer": (TWO, SwappedPresents(), "two steps otherwise"),
    "values-that-fade": (PLAIN, weaker_values, "two steps otherwise"),
    "the-token-before": (PLAIN, Shifted(), "how a text is cut into steps"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_graph_that_depends_on_how_a_text_is_cut_is_refused(name: str, tmp_path: Path) -> None:
    spec, attend, words = STEPS[name]
    path = written(tmp_path, Graph(spec), attend)
    with pytest.raises(ExportError, match=words):
        rewrite(path, tmp_path / "out", **SETTINGS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def split_of(axis: int) -> Attend:
    """Return attention whose queries, keys and values are parts along an axis."""

    def attend(graph: Graph, query: str, key: str, value: str, layer: int) -> str:
        whole = graph.Concat(query, key, value, axis=axis)
        parts = graph.Split(whole, axis=axis, num_outputs=3, outputs=3)
        return Plain(repeat="none")(graph, *parts, layer)

    return attend


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_parts_along_any_axis(axis: int, tmp_path: Path) -> None:
    path = written(tmp_path, Graph(Spec(kv_heads=4)), split_of(axis))
    rewrite(path, tmp_path / "out", **SETTINGS)  # compares it with the original


def in_float16(spec: Spec, folder: Path) -> Any:
    path = written(folder, Graph(spec, dtype=np.float16), group_query())
    return prepare(ExportOptions(path, folder / "out", **SETTINGS))


@pytest.mark.parametrize("scale", [0.3, 0.2267, 0.08, 0.0443])
def test_half_precision_leaves_a_scale_as_it_is(scale: float, tmp_path: Path) -> None:
    job = in_float16(replace(PLAIN, scale=scale), tmp_path)
    assert job.plan.scales[0] == pytest.approx(scale, rel=5e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_learned_sinks_of_any_size(dtype: type, tmp_path: Path) -> None:
    graph = Graph(replace(PLAIN, sinks="learned"), dtype=dtype)
    decoder(graph, group_query())
    model = graph.model()
    sinks = np.array([-13.0, 3.0, -20.0, 25.0], dtype)
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    tensor = next(t for t in model.graph.initializer if t.name == node.input[11])
    tensor.CopyFrom(onnx.numpy_helper.from_array(sinks, tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    job = prepare(ExportOptions(tmp_path / "model.onnx", tmp_path / "out", **SETTINGS))
    assert job.plan.sink_logits[0] == pytest.approx(sinks.astype(float), abs=1e-4)


def test_a_graph_that_breaks_a_rule_is_refused_in_one_line(tmp_path: Path) -> None:
    graph = Graph(PLAIN)
    decoder(graph, Plain())
    model = graph.model()
    for node in model.graph.node:
        if node.op_type == "Softmax":
            node.attribute[0].CopyFrom(helper.make_attribute("axis", "last"))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError) as refused:
        rewrite(tmp_path / "model.onnx", tmp_path / "out", **SETTINGS)
    assert "\n" not in str(refused.value)


def test_caches_larger_than_anything_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, Graph(PLAIN), Plain())
    model = onnx.load(path)
    for value in model.graph.input:
        if value.name.startswith("past") and value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.shape.dim[2].dim_value = 2**30
    onnx.save(model, path)
    with pytest.raises(ModelError, match="larger than anything"):
        rewrite(path, tmp_path / "out", **SETTINGS)
