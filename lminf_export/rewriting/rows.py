"""Products in blocks of integers become operators of `lminf`, and tokens stay rows between them.

A foreign graph multiplies tensors (B, S, K) by weights in blocks, and onnxruntime's MatMulNBits
keeps a packed copy of every weight in memory. `lminf::LinearNBits` reads the same bytes where they
lie, is faster for one token (benchmarks/results/rewriting.json) and takes rows (T, K), so what
treats every token alike is applied to rows as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from lminf_export.export.passes import editing
from lminf_export.operator.contract import DOMAIN
from lminf_export.operator.linear_bodies import (
    CONTRIB_DOMAIN,
    LINEAR_NBITS,
    LINEAR_NBITS_ADD,
    NBITS_ATTRIBUTES,
    nbits_body,
)
from lminf_export.rewriting.layouts import Shapes, are_of_tokens
from lminf_export.rewriting.recording import Recorder

_NBITS = "MatMulNBits"
_BITS, _BLOCK_SIZES = (4, 8), (16, 32, 64, 128, 256)
_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
# Weights, scales, zero points, order of features, bias.
_WEIGHT, _SCALES, _ZEROS, _ORDER, _BIAS = range(1, 6)
# What treats every token alike, whatever the dimensions before the last.
_TOKENWISE = {
    *(("", kind) for kind in ("Add", "Sub", "Mul", "Div", "Sigmoid", "Tanh", "Relu", "Gelu")),
    *(("", kind) for kind in ("SimplifiedLayerNormalization", "RMSNormalization")),
    *((CONTRIB_DOMAIN, kind) for kind in ("Gelu", "FastGelu", "QuickGelu")),
    (CONTRIB_DOMAIN, "SkipSimplifiedLayerNormalization"),
}
_LAST = (-1, 2)  # the axis of features of tensors (B, S, features)


def streams(graph: ir.Graph) -> list[ir.Value]:
    """Return the values whose shapes `to_rows` wants to know."""
    if not any(_is_product(node) for node in graph):
        return []
    nodes = [node for node in graph if _is_product(node) or _is_tokenwise(node)]
    values = (
        value
        for node in nodes
        for value in (
            *node.inputs[:2],
            *(node.outputs if editing.is_op(node, "Split") else node.outputs[:1]),
        )
    )
    return list(dict.fromkeys(v for v in values if v is not None and not _is_constant(v)))


def to_rows(
    model: ir.Model,
    ids: ir.Value,
    shapes: Mapping[ir.Value, Shapes],
    chosen: Iterable[ir.Value],
) -> None:
    """Let products in blocks of integers be computed by `lminf::LinearNBits`, in place.

    Products of other forms than that operator's stay as they are.

    Args:
        model: a rewritten graph.
        ids: (B, S) its tokens.
        shapes: of values, as `FoundGraph` has them.
        chosen: values that depend on which rows' logits are asked for begin here.
    """
    rows = _Rows(model.graph, ids, shapes, _reached(model.graph, chosen))
    for node in list(model.graph):
        rows.visit(node)


def _is_product(node: ir.Node) -> bool:
    """Say whether a node is a product that LinearNBits can compute."""
    if not editing.is_op(node, _NBITS, CONTRIB_DOMAIN):
        return False
    inputs = _inputs(node)
    weight, scales, zeros = inputs[_WEIGHT], inputs[_SCALES], inputs[_ZEROS]
    attributes = node.attributes
    return (
        editing.is_weight(weight, 3)
        and editing.is_weight(scales, 2)
        and scales.dtype in _DTYPES
        and (zeros is None or (editing.is_weight(zeros, 2) and zeros.dtype == ir.DataType.UINT8))
        and inputs[_ORDER] is None
        and (inputs[_BIAS] is None or _is_bias(node, inputs[_BIAS]))
        and attributes.get_int("bits", 4) in _BITS
        and attributes.get_int("block_size", 0) in _BLOCK_SIZES
        and attributes.get_int("weight_prepacked", 0) == 0
    )


def _is_bias(node: ir.Node, value: ir.Value | None) -> bool:
    """Say whether a constant has a number for each result of a product."""
    if value is None or not editing.is_weight(value, 1) or value.shape is None:
        return False
    return value.shape[0] == node.attributes.get_int("N", 0)


def _is_tokenwise(node: ir.Node) -> bool:
    if editing.is_op(node, "Split"):
        return node.attributes.get_int("axis", 0) in _LAST
    if (node.domain, node.op_type) not in _TOKENWISE:
        return False
    # A norm of the last dimension; results besides it and the sum are statistics.
    by_feature = node.attributes.get_int("axis", -1) in _LAST
    unused = not any(value.uses() for value in node.outputs[1:3])
    return by_feature and unused


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None or editing.producer(value, "Constant") is not None


def _inputs(node: ir.Node) -> list[ir.Value | None]:
    return [*node.inputs, *[None] * (6 - len(node.inputs))]


def _reached(graph: ir.Graph, values: Iterable[ir.Value]) -> set[ir.Value]:
    """Return the values that some values decide, and these."""
    found = set(values)
    for node in graph:
        if any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


@dataclass(frozen=True)
class _Flat:
    """The rows (T, width) of a tensor (…, width), and its first dimensions' sizes."""

    rows: ir.Value
    width: int
    sizes: ir.Value


@dataclass
class _Rows:
    """Knows which tensors have their rows at hand.

    Attributes:
        graph: it is changed.
        ids: (B, S).
        shapes: of the graph's values.
        chosen: values that hold the rows whose logits are asked for.
    """

    graph: ir.Graph
    ids: ir.Value
    shapes: Mapping[ir.Value, Shapes]
    chosen: set[ir.Value]
    flat: dict[ir.Value, _Flat] = field(default_factory=dict)
    of_tokens: ir.Value | None = None
    targets: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = field(default_factory=dict)

    def visit(self, node: ir.Node) -> None:
        """Take the next node in order."""
        if _is_product(node):
            self._product(node)
        elif _is_tokenwise(node):
            self._move(node)
        elif editing.is_op(node, "Reshape") and node.inputs[0] in self.flat:
            self._reshape(node)

    def _product(self, node: ir.Node) -> None:
        x, weight, scales, zeros, _, bias = _inputs(node)
        assert x is not None
        rank = self._rank(x)
        if rank is None:
            return
        attributes = [_attribute(node, name) for name in NBITS_ATTRIBUTES]
        old = node.outputs[0]
        add, other = editing.add_of(old) or (None, None)
        if bias is None and add is not None and _is_bias(node, other):
            bias, old = other, add.outputs[0]
        else:
            add = None
        features = node.attributes["K"].as_int()
        flat = None if rank == 2 else self._rows_of(node, x, features)
        kind = LINEAR_NBITS if bias is None else LINEAR_NBITS_ADD
        inputs = [x if flat is None else flat.rows, weight, scales]
        inputs += [value for value in (bias, zeros) if value is not None]
        new = ir.Node(DOMAIN, kind, inputs, attributes)
        new.outputs[0].type = None if scales is None else scales.type
        self.graph.insert_before(node, new)
        if flat is None:
            ir.convenience.replace_all_uses_with(old, new.outputs[0], replace_graph_outputs=True)
        else:
            width = node.attributes["N"].as_int()
            self._unflatten(node, old, _Flat(new.outputs[0], width, flat.sizes))
        self.graph.remove([node] if add is None else [add, node], safe=True)

    def _rank(self, value: ir.Value) -> int | None:
        if value in self.flat:
            return 3
        if editing.producer(value, "GatherND") is not None and value in self.chosen:
            return 3
        return len(self.shapes[value][0]) if value in self.shapes else None

    def _is_of_tokens(self, value: ir.Value) -> bool:
        """Say whether a value has shape (B, S, features)."""
        known = value in self.shapes and value not in self.chosen
        return known and are_of_tokens(self.shapes[value])

    def _rows_of(self, before: ir.Node, x: ir.Value, width: int) -> _Flat:
        """Return a tensor's rows; where there are none yet, they are made before a node."""
        if x in self.flat:
            return self.flat[x]
        op = Recorder()
        if not self._is_of_tokens(x):
            sizes = op.Shape(x, start=0, end=-1)
        else:
            if self.of_tokens is None:
                # Of an input, so it may stand first, before all that asks for it.
                first = Recorder()
                self.of_tokens = first.Shape(self.ids, start=0, end=2)
                self.graph.insert_before(self.graph[0], first.nodes)
            sizes = self.of_tokens
        source = editing.producer(x, "Reshape")
        whole = x if source is None else source.inputs[0]
        flat = _Flat(op.Reshape(whole, op.integers(-1, width)), width, sizes)
        flat.rows.type = x.type
        self.graph.insert_before(before, op.nodes)
        self.flat[x] = flat
        return flat

    def _unflatten(self, before: ir.Node, old: ir.Value, flat: _Flat) -> None:
        """Put rows in the place of a tensor; whoever is not moved to rows reads it as it was."""
        op = Recorder()
        target = self._target(before, flat.sizes, (flat.width,))
        # allowzero: a step may ask for no logits at all, and then 0 means 0.
        new = op.Reshape(flat.rows, target, allowzero=1)
        self.graph.insert_before(before, op.nodes)
        new.type, new.name, old.name = flat.rows.type, old.name, None
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.flat[new] = flat

    def _target(self, before: ir.Node, sizes: ir.Value, rest: tuple[int, ...]) -> ir.Value:
        if (sizes, rest) not in self.targets:
            op = Recorder()
            self.targets[sizes, rest] = op.Concat(sizes, op.integers(*rest), axis=0)
            self.graph.insert_before(before, op.nodes)
        return self.targets[sizes, rest]

    def _move(self, node: ir.Node) -> None:
        """Apply what treats every token alike to rows, where some are at hand already."""
        tensors = [v for v in node.inputs if v is not None and not _is_constant(v)]
        constants = [v for v in node.inputs if v is not None and _is_constant(v)]
        if not any(v in self.flat for v in tensors) or not all(map(_is_vector, constants)):
            return
        if not all(v in self.flat or self._is_of_tokens(v) for v in tensors):
            return
        flats = {
            v: self.flat.get(v) or self._rows_of(node, v, self.shapes[v][0][-1]) for v in tensors
        }
        widths = _widths(node, max(flat.width for flat in flats.values()))
        moved = ir.Node(
            node.domain,
            node.op_type,
            [flats[v].rows if v in flats else v for v in node.inputs],
            [_on_last_axis(a) for a in node.attributes.values()],
            num_outputs=len(node.outputs),
        )
        self.graph.insert_before(node, moved)
        sizes = flats[tensors[0]].sizes
        for old, new, width in zip(node.outputs, moved.outputs, widths, strict=True):
            new.type = old.type
            if old.uses() or old.is_graph_output():
                self._unflatten(node, old, _Flat(new, width, sizes))
            else:
                new.name = ""  # a result that nobody reads
        self.graph.remove(node, safe=True)

    def _reshape(self, node: ir.Node) -> None:
        """Go from rows to (B, S, heads, dim) at once instead of through (B, S, F)."""
        x, target = node.inputs
        assert x is not None
        rest = editing.const_ints(target) or []
        if rest[:2] == [0, 0] and len(rest) > 2 and min(rest[2:]) > 0:
            flat = self.flat[x]
            node.replace_input_with(0, flat.rows)
            node.replace_input_with(1, self._target(node, flat.sizes, tuple(rest[2:])))
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 1)


def _is_vector(value: ir.Value) -> bool:
    """Say whether a constant has at most one dimension."""
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and len(tensor.shape) <= 1


def _widths(node: ir.Node, width: int) -> list[int]:
    """Return the features of a node's results."""
    if node.op_type != "Split":
        return [width] * len(node.outputs)
    sizes = editing.const_ints(node.inputs[1]) if len(node.inputs) > 1 else None
    if sizes:
        return sizes
    count = len(node.outputs)
    each = -(-width // count)  # the last one has what is left
    return [each] * (count - 1) + [width - each * (count - 1)]


def _on_last_axis(attribute: ir.Attr) -> ir.Attr:
    return ir.AttrInt64("axis", -1) if attribute.name == "axis" else attribute


def _attribute(node: ir.Node, name: str) -> ir.Attr:
    """Return an attribute of a product in blocks, which may leave out its defaults."""
    default = {"bits": 4, "accuracy_level": 0}
    return node.attributes.get(name) or ir.AttrInt64(name, default[name])


def attach_bodies(model: ir.Model) -> None:
    """Give a graph the bodies of LinearNBits where it has that operator."""
    for kind, least in ((LINEAR_NBITS, 3), (LINEAR_NBITS_ADD, 4)):
        nodes = [node for node in model.graph if editing.is_op(node, kind, DOMAIN)]
        if nodes:
            zero_points = any(len(node.inputs) > least for node in nodes)
            editing.attach_function(model, nbits_body(kind, zero_points=zero_points))
