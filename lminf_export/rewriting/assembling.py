"""The graph changed: Λ-attention in the place of its own, bounded caches as inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor

from lminf_export.errors import ModelError, shortened
from lminf_export.export.onnx_dtypes import onnx_dtype
from lminf_export.export.passes import editing
from lminf_export.models.steps import PlanTables
from lminf_export.operator import contract, positions
from lminf_export.operator.bindings import (
    INPUT_IDS,
    LOGITS,
    LOGITS_INDEX,
    NEW_LENGTH,
    PAST_LENGTH,
    TensorSpec,
    past_name,
    present_name,
)
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.rewriting.finding import Finding, FoundGraph
from lminf_export.rewriting.layouts import Layout, Shapes
from lminf_export.rewriting.planning import RewritePlan
from lminf_export.rewriting.recording import Recorder
from lminf_export.rewriting.searching import node_name
from lminf_export.rewriting.selecting import select_logits
from lminf_export.tensors.torch_dtypes import torch_dtype

OWN = "lminf."  # what this package's initializers are called by


def assemble(found: FoundGraph, plan: RewritePlan, graph_contract: GraphContract) -> Assembled:
    """Change a graph to one of this package, in place.

    Args:
        found: the graph, and what is in it.
        plan: how its layers will attend.
        graph_contract: the inputs and outputs it will have.

    Returns:
        What is known of its values by then.

    Raises:
        ModelError: something besides attention depends on the old inputs.
    """
    graph = found.model.graph
    inputs = {spec.name: _input(spec) for spec in graph_contract.inputs()}
    old = dict(found.inputs.roles)
    # Old inputs may have the names of new ones; they keep their readers until those are gone.
    for value in old:
        value.name = f"original.{value.name}"
    _free_names(
        graph, {spec.name for spec in (*graph_contract.inputs(), *graph_contract.outputs())}
    )
    for name in [name for name in graph.initializers if name.startswith(OWN)]:
        editing.rename_initializer(graph, name, f"original.{name}")
    ids = _take_ids(found, inputs[INPUT_IDS])
    builder = _Builder(found, plan, graph_contract, inputs, ids)
    outputs = builder.build()
    logits = select_logits(found, inputs[LOGITS_INDEX], ids)
    graph.outputs.clear()
    graph.inputs.clear()
    graph.inputs.extend(inputs.values())
    op = Recorder()
    wide = op.Cast(logits, to=ir.DataType.FLOAT)
    graph.extend(op.nodes)
    wide.name = LOGITS
    for spec in graph_contract.outputs():
        value = wide if spec.name == LOGITS else outputs[spec.name]
        value.name, value.dtype = spec.name, onnx_dtype(spec.dtype)
        graph.outputs.append(value)
    found.model.opset_imports[contract.DOMAIN] = contract.VERSION
    common.TopologicalSortPass()(found.model)
    editing.eliminate_identities(found.model)
    common.RemoveUnusedNodesPass()(found.model)
    _require_free(graph, old)
    ends = set(graph.outputs)
    for value in (value for node in graph for value in node.outputs if value not in ends):
        value.shape = None  # what is said of sizes was true of the old inputs
    return Assembled(ids, inputs[LOGITS_INDEX], {**found.shapes, **builder.shapes})


@dataclass(frozen=True)
class Assembled:
    """Facts about the values of a changed graph.

    Attributes:
        ids: (B, S) the tokens.
        index: (B, K) the rows whose logits are asked for.
        shapes: of values that do not depend on `index`, as `FoundGraph` has them.
    """

    ids: ir.Value
    index: ir.Value
    shapes: Mapping[ir.Value, Shapes]


def _input(spec: TensorSpec) -> ir.Value:
    return ir.Value(
        name=spec.name, type=ir.TensorType(onnx_dtype(spec.dtype)), shape=ir.Shape(spec.shape)
    )


def _free_names(graph: ir.Graph, names: set[str]) -> None:
    """Rename what has the name of a new input or output."""
    for value in (value for node in graph for value in node.outputs):
        if value.name in names:
            value.name = f"original.{value.name}"
    for name in names & graph.initializers.keys():
        editing.rename_initializer(graph, name, f"original.{name}")


def _take_ids(found: FoundGraph, new: ir.Value) -> ir.Value:
    """Let the graph read the new input of ids, converted where it took another type."""
    old = found.inputs.ids
    ids = new
    if old.dtype != ir.DataType.INT64:
        op = Recorder()
        ids = op.Cast(new, to=old.dtype)
        found.model.graph.insert_before(found.model.graph[0], op.nodes)
    ir.convenience.replace_all_uses_with(old, ids)
    return new


def _require_free(graph: ir.Graph, old: Mapping[ir.Value, str]) -> None:
    """Check that nothing that is left reads an input of the original graph.

    Raises:
        ModelError: naming it.
    """
    for value, role in old.items():
        readers = [use.node for use in value.uses() if use.node.graph is not None]
        if readers:
            name = str(value.name).removeprefix("original.")
            what = (
                "a layer's state besides keys and values"
                if role == "cache"
                else "positions outside of attention, such as learned position embeddings, which "
                "end at the training length"
            )
            raise ModelError(
                f"{node_name(readers[0])} still reads {shortened(name, 40)} when attention is "
                f"replaced: {what}; such a model cannot be rewritten"
            )


@dataclass
class _Builder:
    """Puts Λ-attention into a graph.

    Attributes:
        found: the graph.
        plan: how its layers attend.
        contract: inputs and outputs.
        inputs: the new inputs by name.
        ids: (B, S) the tokens.
        outputs: the new caches by name.
        shapes: of attentions' results, as `FoundGraph` has them.
    """

    found: FoundGraph
    plan: RewritePlan
    contract: GraphContract
    inputs: Mapping[str, ir.Value]
    ids: ir.Value
    outputs: dict[str, ir.Value] = field(default_factory=dict)
    shapes: dict[ir.Value, Shapes] = field(default_factory=dict)

    def build(self) -> dict[str, ir.Value]:
        """Replace all attentions; return the new caches by name."""
        graph = self.found.model.graph
        op = Recorder()
        self.tables = PlanTables(self.plan.attention, torch_dtype(self.contract.dtype))
        position = positions.onnx_token_positions(op, self.inputs[PAST_LENGTH], self.ids)
        self.position = position
        self.rows = [
            positions.onnx_rotary_rows(
                op, position, self._constant(f"cos_{k}"), self._constant(f"sin_{k}")
            )
            for k in range(len(self.plan.attention.rotations))
        ]
        self.slots: dict[int, ir.Value] = {}
        for index, layer in enumerate(self.plan.attention.layers):
            if layer.ring_capacity not in self.slots:
                self.slots[layer.ring_capacity] = positions.onnx_slot_positions(
                    op,
                    self.inputs[PAST_LENGTH],
                    self.inputs[NEW_LENGTH],
                    self.inputs[past_name(index, "key")],
                )
        self.sizes = (op.Shape(self.ids, start=0, end=1), op.Shape(self.ids, start=1, end=2))
        graph.insert_before(graph[0], op.nodes)
        for index, finding in enumerate(self.found.layers):
            self._replace(index, finding)
        return self.outputs

    def _constant(self, name: str) -> ir.Value:
        """Return one of the plan's tables as an initializer of the graph."""
        return self._initializer(f"{OWN}{name}", self.tables.get_buffer(name))

    def _initializer(self, name: str, tensor: Tensor) -> ir.Value:
        graph = self.found.model.graph
        if name not in graph.initializers:
            data = ir.tensor(tensor, name=name)
            value = ir.Value(
                name=name,
                type=ir.TensorType(data.dtype),
                shape=ir.Shape(tensor.shape),
                const_value=data,
            )
            graph.initializers[name] = value
        return graph.initializers[name]

    def _replace(self, index: int, finding: Finding) -> None:
        plan, anchor = self.plan.attention, finding.anchor
        spec = plan.layers[index]
        op = Recorder()
        query, key, value = (
            self._in_heads(op, tensor, layout)
            for tensor, layout in (
                (anchor.query, finding.layouts.query),
                (anchor.key, finding.layouts.key),
                (anchor.value, finding.layouts.value),
            )
        )
        kinds = ("key", "value", "sink_key", "sink_value")
        caches = [self.inputs.get(past_name(index, kind)) for kind in kinds]
        if not spec.num_sink_tokens:
            name = f"no_sinks_{spec.num_kv_heads}_{spec.head_dim}"
            caches[2:] = [self._constant(name)] * 2
        rotation = plan.layer_rotation[index]
        kind = None if rotation is None else plan.rotations[rotation]
        output, *present = op.of(contract.DOMAIN).LambdaAttention(
            query,
            key,
            value,
            *caches,
            self.inputs[PAST_LENGTH],
            self.inputs[NEW_LENGTH],
            self.position,
            self.slots[spec.ring_capacity],
            *self._turned(index),
            self._constant("alibi_slopes"),
            self._sink_logits(index),
            _outputs=5,
            num_sink_tokens=spec.num_sink_tokens,
            window_size=spec.window_size,
            distance_limit=spec.distance_limit,
            rotary_dim=kind.rotary_dim if kind else 0,
            rotary_interleaved=int(bool(kind and kind.interleaved)),
            scale=self.plan.scales[index],
            softcap=plan.softcap,
            **{contract.PLUGIN_NAMESPACE_ATTRIBUTE: contract.DOMAIN},
        )
        for name, tensor in zip(kinds, present, strict=True):
            self.outputs[present_name(index, name)] = tensor
        self._place(op, finding, output)

    def _place(self, op: Recorder, finding: Finding, output: ir.Value) -> None:
        """Put the nodes of one attention into the graph, and its result in the old one's place."""
        anchor = finding.anchor
        new = self._from_heads(op, output, finding.layouts.output, anchor.output.dtype)
        graph = self.found.model.graph
        after = anchor.output.producer()
        assert after is not None
        graph.insert_before(after, op.nodes)
        ir.convenience.replace_all_uses_with(anchor.output, new)
        self.shapes[new] = self.found.shapes[anchor.output]

    def _turned(self, index: int) -> tuple[ir.Value, ...]:
        """Return the rows of positions, and of the distance limit, of a layer's rotation."""
        rotation = self.plan.attention.layer_rotation[index]
        if rotation is None:
            row, limit = self._constant("no_rotation"), self._constant("no_limit")
            return row, row, limit, limit
        limit_of = f"{rotation}_{self.plan.attention.layers[index].distance_limit}"
        cos, sin = self.rows[rotation]
        return cos, sin, *(self._constant(f"limit_{part}_{limit_of}") for part in ("cos", "sin"))

    def _sink_logits(self, index: int) -> ir.Value:
        logits = self.plan.sink_logits[index]
        if logits is None:
            return self._constant("no_sink_logits")
        return self._initializer(f"{OWN}sink_logits_{index}", torch.from_numpy(logits).float())

    def _in_heads(self, op: Recorder, value: ir.Value, layout: Layout) -> ir.Value:
        """Return (B, H, S, D) of the model's element type."""
        wanted = onnx_dtype(self.contract.dtype)
        if value.dtype not in (None, wanted):
            value = op.Cast(value, to=wanted)
        heads, dim = layout.heads, layout.head_dim
        if layout.order == "BHSD":
            return value
        if layout.order == "NSD":
            return op.Reshape(value, self._shape(op, heads, "S", dim))
        if layout.order != "BSHD":
            shape = (
                op.integers(0, 0, heads, dim)
                if layout.order == "BSE"
                else self._shape(op, "S", heads, dim)
            )
            value = op.Reshape(value, shape)
        return op.Transpose(value, perm=[0, 2, 1, 3])

    def _from_heads(
        self, op: Recorder, value: ir.Value, layout: Layout, dtype: ir.DataType | None
    ) -> ir.Value:
        """Return attention's result as the graph goes on with it."""
        heads, dim = layout.heads, layout.head_dim
        if dtype not in (None, onnx_dtype(self.contract.dtype)):
            value = op.Cast(value, to=dtype)
        if layout.order == "BHSD":
            return value
        if layout.order == "NSD":
            return op.Reshape(
                value, op.Concat(op.integers(-1), self.sizes[1], op.integers(dim), axis=0)
            )
        value = op.Transpose(value, perm=[0, 2, 1, 3])
        shapes = {"BSE": (0, 0, -1), "TE": (-1, heads * dim), "THD": (-1, heads, dim)}
        if layout.order in shapes:
            value = op.Reshape(value, op.integers(*shapes[layout.order]))
        return value

    def _shape(self, op: Recorder, *rest: int | str) -> ir.Value:
        """Return the shape (B, …), where "S" stands for the new tokens."""
        parts = [self.sizes[0]]
        for dim in rest:
            parts.append(self.sizes[1] if isinstance(dim, str) else op.integers(dim))
        return op.Concat(*parts, axis=0)
