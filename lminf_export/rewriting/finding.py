"""Everything that is found out about a foreign graph before anything is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import onnx_ir as ir

from lminf_export.bundle.records import OnnxOrigin
from lminf_export.errors import ModelError
from lminf_export.export.onnx_dtypes import dtype_name
from lminf_export.operator.settings import Dtype
from lminf_export.progress import Progress
from lminf_export.rewriting.anchors import find_anchors
from lminf_export.rewriting.attending import Attention
from lminf_export.rewriting.choosing import choose
from lminf_export.rewriting.feeds import Call, Inputs, cache_shape, read_inputs
from lminf_export.rewriting.layouts import LONG, SHORT, Layouts, Shapes
from lminf_export.rewriting.measure import Measured, measure
from lminf_export.rewriting.parts import Parts
from lminf_export.rewriting.plain_forms import plain_forms, window_of_caches
from lminf_export.rewriting.reading import read_graph, take_sizes_from_tokens
from lminf_export.rewriting.rows import streams
from lminf_export.rewriting.searching import MICROSOFT, Anchor
from lminf_export.rewriting.towards import way_up
from lminf_export.rewriting.views import view_caches

_COMPARISONS = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_LONGEST_CHANGE = 2**20  # tokens; larger numbers stand for no length


@dataclass(frozen=True)
class Finding:
    """One attention of a graph: where it is, how its tensors lie, what it computes."""

    anchor: Anchor
    layouts: Layouts
    measured: Measured


@dataclass(frozen=True)
class FoundGraph:
    """A foreign graph and what was found in it.

    Attributes:
        model: the graph, in the forms that were measured; its file is as it was.
        inputs: its inputs by their roles.
        layers: its attentions, in order.
        logits: the output that scores the vocabulary.
        vocab_size: V.
        dtype: element type of the caches.
        head_dims: D of caches whose shape leaves it open, by name.
        least_capacity: slots that the original's caches must have at least, or None.
        origin: the file, for the manifest.
        shapes: of every value that was asked for, with SHORT tokens and with LONG.
    """

    model: ir.Model
    inputs: Inputs
    layers: tuple[Finding, ...]
    logits: ir.Value
    vocab_size: int
    dtype: Dtype
    head_dims: Mapping[str, int]
    least_capacity: int | None
    origin: OnnxOrigin
    shapes: Mapping[ir.Value, Shapes]


def find_in_graph(path: Path, head_dim: int | None, progress: Progress) -> FoundGraph:
    """Read a graph and find out how it attends.

    Args:
        path: the graph's file.
        head_dim: D, from the files beside it, for caches whose shape leaves it open.
        progress: receives the phase that runs.

    Raises:
        ModelError: naming what is not understood.
    """
    progress("reading the graph", None)
    model = read_graph(path)
    graph = model.graph
    inputs = read_inputs(graph)
    take_sizes_from_tokens(graph, inputs)
    inputs = view_caches(graph, inputs)
    caches = {*inputs.roles, *inputs.caches}
    head_dims = {} if head_dim is None else {str(v.name): head_dim for v in caches}
    least_capacity = window_of_caches(graph)
    plain_forms(graph, inputs, head_dims)
    anchors = find_anchors(graph, inputs)
    _check_caches(inputs, anchors)
    logits = _logits(graph)
    parts = Parts(model, path.parent)
    progress("running the graph", None)
    wanted = [*_values(anchors), *_tokenwise(logits), *streams(graph)]
    inputs, shapes = _run_whole(parts, inputs, head_dims, wanted)
    limits = [n for n in (_table_rows(graph), inputs.slots) if n is not None]
    longest = min(limits, default=None)
    changes = _compared_lengths(graph)
    layers: list[Finding] = []
    known: dict[bytes, Measured] = {}
    for index, anchor in enumerate(anchors):
        progress(f"measuring attention {index + 1} of {len(anchors)}", None)
        of_keys, of_values = (
            cache_shape(cache, Call(1, 1, head_dims))[3]
            for cache in (anchor.past_key, anchor.past_value)
        )
        anchor, layouts = choose(anchor, shapes, (of_keys, of_values), inputs)
        attention = Attention(parts, inputs, anchor, layouts, head_dims, longest, changes)
        print_ = attention.fingerprint()
        if print_ not in known:
            known[print_] = measure(attention)
        layers.append(Finding(anchor, layouts, known[print_]))
    return FoundGraph(
        model=model,
        inputs=inputs,
        layers=tuple(layers),
        logits=logits,
        vocab_size=shapes[logits][0][-1],
        dtype=_dtype(anchors),
        head_dims=head_dims,
        least_capacity=least_capacity,
        origin=_origin(path.name, model),
        shapes=shapes,
    )


def _origin(name: str, model: ir.Model) -> OnnxOrigin:
    """Say which file it is, who wrote it, and how its products are stored."""
    producer = " ".join(x for x in (model.producer_name, model.producer_version) if x)
    kinds = Counter(kind for node in model.graph if (kind := _integers(node)) is not None)
    return OnnxOrigin(file=name, producer=producer, integer_products=dict(sorted(kinds.items())))


def _integers(node: ir.Node) -> str | None:
    """Return the type of the integers of a product's weights, None where they are none."""
    if node.domain == MICROSOFT and node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        return f"int{node.attributes.get_int('bits', 4)}"
    if node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
        return "int8"
    first = node.inputs[0] if node.op_type == "DequantizeLinear" and node.inputs else None
    if first is not None and first.const_value is not None:
        return str(first.const_value.dtype).lower().removeprefix("u")
    return None


def _dtype(anchors: list[Anchor]) -> Dtype:
    kinds = {a.past_key.dtype for a in anchors} | {a.past_value.dtype for a in anchors}
    if len(kinds) > 1:
        raise ModelError(
            f"the graph's caches have several element types: {sorted(map(str, kinds))}"
        )
    kind = kinds.pop()
    assert kind is not None
    return cast(Dtype, dtype_name(kind))  # `feeds` takes caches of no other types


def _check_caches(inputs: Inputs, anchors: list[Anchor]) -> None:
    """Every cache belongs to one attention, and every attention has its own two."""
    used = [value for a in anchors for value in (a.past_key, a.past_value)]
    shared = sorted({str(v.name) for v in used if used.count(v) > 1})
    if shared:
        raise ModelError(
            f"the cache {shared[0]} is read by several attentions; expected one for each layer"
        )
    unused = [str(v.name) for v in inputs.caches if v not in used]
    if unused:
        raise ModelError(
            f"the input {unused[0]} is no cache of keys or values of an attention that was found: "
            f"the layer keeps another state, which bounded caches do not carry"
        )


def _logits(graph: ir.Graph) -> ir.Value:
    outputs = [value for value in graph.outputs if value.name == "logits"]
    if not outputs:
        names = ", ".join(str(value.name) for value in list(graph.outputs)[:4])
        raise ModelError(
            f"the graph has no output logits (it has {names}): its head is another file, or it is "
            f"no language model"
        )
    return outputs[0]


def _values(anchors: list[Anchor]) -> list[ir.Value]:
    return [v for a in anchors for values in a.candidates.values() for v in values]


def _tokenwise(logits: ir.Value) -> list[ir.Value]:
    """Return the values on the way from the last layer to the logits, the logits first."""
    return [logits, *(above for _, above in way_up(logits) if above.producer() is not None)]


def _run_whole(
    parts: Parts, inputs: Inputs, head_dims: Mapping[str, int], values: list[ir.Value]
) -> tuple[Inputs, dict[ir.Value, Shapes]]:
    """Return shapes of some values, and the inputs with what is known of them then."""
    try:
        return inputs, _shapes(parts, inputs, head_dims, values)
    except ModelError as error:
        in_place = replace(inputs, in_place=True)
        try:
            return in_place, _shapes(parts, in_place, head_dims, values)
        except ModelError:
            raise error from None


def _shapes(
    parts: Parts, inputs: Inputs, head_dims: Mapping[str, int], values: list[ir.Value]
) -> dict[ir.Value, Shapes]:
    """Run the whole graph twice; return the shapes of some values."""
    wanted = list(dict.fromkeys(values))
    short, long = (
        parts.shapes(wanted, inputs.feeds(Call(count, 0, head_dims))) for count in (SHORT, LONG)
    )
    return {v: (a, b) for v, a, b in zip(wanted, short, long, strict=True)}


def _table_rows(graph: ir.Graph) -> int | None:
    """Return the rows of the shortest table that rotations look positions up in."""
    places = {
        (MICROSOFT, "GroupQueryAttention"): 7,
        (MICROSOFT, "RotaryEmbedding"): 2,
        ("", "RotaryEmbedding"): 1,
    }
    rows = []
    for node in graph:
        place = places.get((node.domain, node.op_type))
        if place is None or place >= len(node.inputs):
            continue
        table = node.inputs[place]
        shape = None if table is None else table.shape
        if shape is not None and len(shape) == 2 and isinstance(shape[0], int):
            rows.append(shape[0])
    return min(rows, default=None)


def _compared_lengths(graph: ir.Graph) -> int:
    """Return the largest whole number that anything is compared with, 0 without one.

    Rotations that change with the length of a text compare it with one.
    """
    found = [0]
    for node in graph:
        if node.op_type not in _COMPARISONS:
            continue
        for value in node.inputs:
            tensor = None if value is None else ir.convenience.get_const_tensor(value)
            if tensor is not None and tensor.size == 1:
                number = float(tensor.numpy().reshape(-1)[0])
                found += [int(number)] if number < _LONGEST_CHANGE else []
    return max(found)
