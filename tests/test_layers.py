"""Layers traced once and repeated: the very graph that tracing each of them makes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from benchmarks.support.families import CASES, CHUNK, SINKS, WINDOW
from benchmarks.support.own_families import make_config
from lminf_export import LambdaConfig
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.export.passes.number_names import NumberNamesPass
from lminf_export.export.passes.repeat_layers import RepeatLayersPass
from lminf_export.export.trace import tracing
from lminf_export.export.trace.layer_records import (
    Templates,
    UnlikeLayersError,
    check_first,
    find_stack,
    find_templates,
    shortened,
)
from lminf_export.export.trace.traced_module import TracedModule
from lminf_export.models.registry import find_family
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.tensors.torch_dtypes import torch_dtype
from tests.support.small_graphs import toy
from tests.support.tiny_models import llama_config
from tests.support.weightless import export_without_weights


@dataclass(frozen=True)
class Repeated:
    """A model of many layers, and which of the first ones stand for those behind them.

    Attributes:
        family: the name of its case in benchmarks/support/families.py or own_families.py.
        templates: what is expected.
        changes: of its configuration.
        dtype: element type of weights and caches.
        kv_cache_dtype: "int8", or None.
        lambda_layers: as of `LambdaConfig`.
    """

    family: str
    templates: Templates
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    kv_cache_dtype: str | None = None
    lambda_layers: str = "full"

    def config(self) -> Any:
        """Make the configuration."""
        case = next((case for case in CASES if case.model_type == self.family), None)
        if case is None:
            return make_config(self.family, **self.changes)
        return replace(case, changes={**case.changes, **self.changes}).config()


def layers(letters: str) -> dict[str, Any]:
    """Return the settings of so many layers, sliding (s) or full (f)."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    return {"num_hidden_layers": len(letters), "layer_types": [names[x] for x in letters]}


REPEATED = [
    Repeated("llama", Templates(2, (1, 1)), {"num_hidden_layers": 4}, "float16", "int8"),
    # Tied embeddings; a window and a rotation for each kind of layer.
    Repeated(
        "gemma3_text", Templates(4, (2, 2, 3)), {**layers("fssfssf"), "tie_word_embeddings": True}
    ),
    Repeated("cohere2", Templates(3, (1, 2)), layers("ssfsf"), lambda_layers="all"),
    Repeated(
        "smollm3", Templates(3, (1, 2)), {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 0, 1, 0]}
    ),
    # The first two have no experts; the third makes a product of sizes that all others read.
    Repeated("dots1", Templates(4, (2, 3)), {**layers("sffsfs"), "first_k_dense_replace": 2}),
    Repeated("gpt_oss", Templates(3, (1, 2, 1)), layers("ssfsfs")),
    Repeated("mpt", Templates(2, (1, 1)), {"n_layers": 4}),
]


def plan_of(config: Any, lambda_layers: str = "full") -> Any:
    settings = LambdaConfig(WINDOW, SINKS, chunk_size=CHUNK, lambda_layers=lambda_layers)
    return find_family(config.model_type).plan(config, settings)


@pytest.mark.slow
@pytest.mark.parametrize("case", REPEATED, ids=lambda case: case.family)
def test_a_graph_of_repeated_layers_is_that_of_traced_ones(case, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, tracing.__name__)
    config = case.config()
    plan = plan_of(config, case.lambda_layers)
    family, graphs = find_family(config.model_type), []
    for way in ("repeated", "traced"):
        if way == "traced":
            monkeypatch.setattr(tracing, "_trace_templates", lambda _: None)
        contract = GraphContract(plan.layers, case.dtype, case.kv_cache_dtype, config.vocab_size)
        traced = tracing.trace(Skeleton(config, torch_dtype(case.dtype)), family, plan, contract)
        folder = tmp_path / way
        folder.mkdir()
        export_without_weights(traced, plan, folder)
        weights = [(name, traced.weight_names[name]) for name in traced.weight_names]
        graphs.append((weights, (folder / "model.onnx").read_bytes()))
    assert graphs[0] == graphs[1]
    assert f"{case.templates.traced} of {len(plan.layers)} layers traced" in caplog.text


@pytest.mark.parametrize("case", REPEATED, ids=lambda case: case.family)
def test_kinds_of_layers_are_seen(case):
    config = case.config()
    assert templates_of(config, plan_of(config, case.lambda_layers)) == case.templates


def templates_of(config: Any, plan: Any, change: Callable[[nn.Module], object] = id) -> Templates:
    """Return the templates found in a model that was changed after it was built."""
    model = Skeleton(config).model
    change(model)
    with find_family(config.model_type).patched(model), torch.no_grad():
        contract = GraphContract(plan.layers, "float32", None, config.vocab_size)
        module = TracedModule(model, plan, contract)
        stack = find_stack(module.wrapped, len(plan.layers))
        whole = module.record(stack)
        templates = find_templates(whole.layers)
        with shortened(module.wrapped, stack, templates.traced):
            check_first(module.first(templates.traced).record(stack), whole)
    return templates


def scale_by_depth(model: nn.Module) -> None:
    """Multiply what a layer's feed-forward part returns by a number made from its index."""
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *x, index=index: x[2] / (1 + index // 3))


def other_epsilon(model: nn.Module) -> None:
    model.model.layers[3].input_layernorm.variance_epsilon = 1e-3


def other_scale(model: nn.Module) -> None:
    model.model.layers[3].self_attn.scaling = 0.25


def other_width(model: nn.Module) -> None:
    mlp = model.model.layers[3].mlp
    with torch.device("meta"):
        mlp.gate_proj, mlp.up_proj = (nn.Linear(60, 88, bias=False) for _ in range(2))
        mlp.down_proj = nn.Linear(88, 60, bias=False)


def other_constant(model: nn.Module) -> None:
    """Add a tensor that is no weight, of another value in one layer, to what layers compute."""
    for index, layer in enumerate(model.model.layers):
        added = torch.tensor(float(index == 3))
        layer.mlp.register_forward_hook(lambda *x, added=added: x[2] + added)


def tied_weight(model: nn.Module) -> None:
    model.model.layers[3].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight


@pytest.mark.parametrize(
    "change", [other_epsilon, other_scale, other_width, other_constant, tied_weight]
)
def test_a_layer_that_differs_in_anything_stands_for_no_other(change):
    config = llama_config(num_hidden_layers=6)
    assert templates_of(config, plan_of(config), change) == Templates(4, (2, 2))


def test_layers_are_scaled_by_their_depth_one_after_the_other():
    config = llama_config(num_hidden_layers=6)
    assert templates_of(config, plan_of(config), scale_by_depth) == Templates(4, (3, 3))


def count_layers(model: nn.Module) -> None:
    """Divide what leaves the last layer by how many there are."""
    model.model.norm.register_forward_hook(lambda *x: x[2] / len(model.model.layers))


def last_is_special(model: nn.Module) -> None:
    model.model.layers[5].mlp.register_forward_hook(lambda *x: x[2] * 2)


def second_stream(model: nn.Module) -> None:
    """Let each layer read what the one before it computed on the way."""
    before: list[Any] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *x: before.append(x[2]) or x[2] + before[-2:][0])


def hidden_sum(model: nn.Module) -> None:
    """Let all layers add to one tensor, in place."""
    embedded: list[Any] = []
    model.model.embed_tokens.register_forward_hook(lambda *x: embedded.append(x[2]))
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *x: embedded[-1].add_(x[2]))


@pytest.mark.parametrize("change", [count_layers, last_is_special, second_stream, hidden_sum])
def test_a_model_that_is_more_than_a_row_of_layers_is_traced_in_full(change):
    config = llama_config(num_hidden_layers=6)
    with pytest.raises(UnlikeLayersError):
        templates_of(config, plan_of(config), change)


@pytest.mark.slow
def test_layers_that_cannot_be_told_alike_are_traced_and_the_log_says_why(
    tmp_path, monkeypatch, caplog
):
    config = llama_config(num_hidden_layers=4)
    plan, family = plan_of(config), find_family("llama")
    skeleton = Skeleton(config, torch.float16)
    skeleton.model.model.layers[3].self_attn.scaling = 0.25
    # A command line that ran before in this process has set up the package's logger for itself.
    monkeypatch.setattr(logging.getLogger("lminf_export"), "propagate", True)
    with caplog.at_level(logging.INFO, "lminf_export"):
        contract = GraphContract(plan.layers, "float16", None, config.vocab_size)
        traced = tracing.trace(skeleton, family, plan, contract)
    assert "every layer is traced by itself: the last of its layers is the first" in caplog.text
    graph = export_without_weights(traced, plan, tmp_path)
    scales = [a.f for n in graph.node for a in n.attribute if a.name == "scale"]
    assert scales == [pytest.approx(10**-0.5)] * 3 + [0.25]


def serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


def described(model: ir.Model) -> bytes:
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor([1.0], name=value.name)
    NumberNamesPass(set(model.graph.initializers))(model)
    for node in model.graph:
        node.metadata_props.clear()
    return serialized(model)


def test_copied_layers_get_weights_caches_and_a_place_of_their_own():
    model, names = toy(2), [f"m.layers.{i}.w" for i in range(5)]
    RepeatLayersPass("m.layers", (1, 1, 1), names)(model)
    assert list(model.graph.initializers) == names
    assert described(model) == described(toy(5))


@pytest.mark.parametrize(("sized", "templates"), [(0, (1, 2)), (1, (1, 2)), (1, (2, 1)), (2, ())])
def test_a_size_that_layers_share_is_made_once(sized, templates):
    model, names = toy(3, sized=sized), [f"m.layers.{i}.w" for i in range(3 + len(templates))]
    RepeatLayersPass("m.layers", templates, names)(model)
    assert described(model) == described(toy(3 + len(templates), sized=sized))


@pytest.mark.parametrize("flaw", ["weight", "cache", "order", "far", "output", "size"])
def test_a_graph_whose_layers_share_more_than_a_stream_is_left_alone(flaw):
    model = toy(3, flaw, sized=1 if flaw == "size" else None)
    before = serialized(model)
    with pytest.raises(UnlikeLayersError):
        RepeatLayersPass("m.layers", (2, 2), [])(model)
    assert serialized(model) == before
