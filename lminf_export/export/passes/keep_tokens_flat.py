"""Between projections tokens stay rows of a matrix; they are put back into batches for attention.

Projections flatten (B, S, …) to (B·S, …) and unflatten their result. What lies between two of
them acts on each token alone: norms, activations, sums. It may as well act on the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, ensure_sound, require
from lminf_export.export.passes.editing import const_ints, ints, rank
from lminf_export.export.passes.linear_to_gemm import require_gemm

# Operators that treat every token, or every element, alike; with rank-1 or scalar constants.
_TOKENWISE = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "Clip"),
        *("Sigmoid", "Tanh", "Relu", "Gelu", "Erf", "Exp", "Softplus", "Sqrt", "Neg", "Abs"),
        *("Cast", "Identity", "Reciprocal", "RMSNormalization", "LayerNormalization"),
    }
)


class KeepTokensFlatPass(ir.passes.InPlacePass):
    """Move tokenwise operators from (B, S, F) tensors to their (B·S, F) rows.

    An unflattening is a Reshape whose target was put together by a Concat, a flattening one with
    the constant target (−1, F). Unused Reshapes are left to dead-code removal.

    Requires: `LinearToGemmPass` has run.
    Ensures: no rows are unflattened only to be flattened again.
    """

    def requires(self, model: ir.Model) -> None:
        require_gemm(model, require)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        rows = _Rows(model.graph)
        for node in list(model.graph):
            if node.domain or len(node.outputs) != 1:
                continue
            if node.op_type == "Reshape":
                rows.see_reshape(node)
            elif node.op_type == "Gather":
                rows.seed(node)
            elif node.op_type in _TOKENWISE:
                rows.move(node)
        return ir.passes.PassResult(model, bool(rows.flat))

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            rows = node.outputs[0]
            if editing.is_op(node, "Reshape") and (rows.uses() or rows.is_graph_output()):
                before = editing.producer(node.inputs[0], "Reshape")
                in_vain = (
                    before is not None
                    and _is_rows_target(node.inputs[1])
                    and _is_joined_shape(before.inputs[1])
                )
                ensure(not in_vain, f"{rows.name} flattens what was unflattened")
        ensure_sound(model)


@dataclass(frozen=True)
class _Flat:
    """The rows of a batched value, and the target of the Reshape that leads back."""

    rows: ir.Value
    target: ir.Value


class _Rows:
    """Which (B, S, F) values have their (B·S, F) rows at hand."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.flat: dict[ir.Value, _Flat] = {}

    def see_reshape(self, node: ir.Node) -> None:
        """Skip a flattening whose rows are at hand; remember what an unflattening came from."""
        source, target = node.inputs
        assert source is not None
        assert target is not None
        if _is_joined_shape(target):
            self.flat[node.outputs[0]] = _Flat(source, target)
        elif _is_rows_target(target):
            self._skip_flattening(node, source)
        elif source in self.flat:
            self._split_rows(node, self.flat[source])

    def _skip_flattening(self, node: ir.Node, source: ir.Value) -> None:
        producer = source.producer()
        if source in self.flat:
            ir.convenience.replace_all_uses_with(node.outputs[0], self.flat[source].rows)
        elif producer is not None and producer.op_type == "Reshape":
            # (−1, F) says all there is to say, whatever shape came between.
            node.replace_input_with(0, producer.inputs[0])

    def _split_rows(self, node: ir.Node, flat: _Flat) -> None:
        """Go from rows to (B, S, heads, dim) at once instead of through (B, S, F)."""
        target = const_ints(node.inputs[1]) or []
        joined = flat.target.producer()
        if target[:2] != [0, 0] or min(target[2:], default=0) < 1 or joined is None:
            return
        tail = ints(*target[2:], as_list=True)
        whole = ir.node("Concat", [joined.inputs[0], tail.outputs[0]], {"axis": 0})
        self.graph.insert_before(node, [tail, whole])
        node.replace_input_with(0, flat.rows)
        node.replace_input_with(1, whole.outputs[0])
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 1)

    def seed(self, gather: ir.Node) -> None:
        """Flatten the embedding's result once, where the stream of tokens begins."""
        table, tokens = gather.inputs
        value = gather.outputs[0]
        is_embedding = table is not None and table.is_initializer() and rank(value) == 3
        if not is_embedding or tokens is None or not tokens.is_graph_input():
            return
        width = value.shape[2] if value.shape is not None else None
        assert isinstance(width, int)
        rows_target = ints(-1, width, as_list=True)
        flatten = ir.node("Reshape", [value, rows_target.outputs[0]])
        flatten.outputs[0].type = value.type
        shape = ir.node("Shape", [tokens], {"start": 0, "end": 2})
        last = ints(width, as_list=True)
        back = ir.node("Concat", [shape.outputs[0], last.outputs[0]], {"axis": 0})
        self.graph.insert_after(gather, [rows_target, flatten, shape, last, back])
        self.flat[value] = _Flat(flatten.outputs[0], back.outputs[0])

    def move(self, node: ir.Node) -> None:
        """Apply a tokenwise node to rows, and unflatten its result for its other readers."""
        value = node.outputs[0]
        tensors = [x for x in node.inputs if x is not None and rank(x) != 0]
        tokens = [x for x in tensors if x in self.flat]
        others = [x for x in tensors if x not in self.flat]
        # Where the trace left a shape out, it is that of the inputs.
        value.shape = value.shape or (tokens[0].shape if tokens else None)
        same_shape = {str(x.shape) for x in (*tokens, value)}
        if not tokens or len(same_shape) != 1 or any(rank(x) != 1 for x in others):
            return
        inputs = [self.flat[x].rows if x in self.flat else x for x in node.inputs]
        moved = ir.node(node.op_type, inputs, dict(node.attributes))
        moved.outputs[0].type = value.type
        target = self.flat[tokens[0]].target
        back = ir.node("Reshape", [moved.outputs[0], target], {"allowzero": 1})
        editing.replace(self.graph, node, [moved, back])
        self.flat[back.outputs[0]] = _Flat(moved.outputs[0], target)


def _is_rows_target(target: ir.Value | None) -> bool:
    numbers = const_ints(target)
    return numbers is not None and len(numbers) == 2 and numbers[0] == -1


def _is_joined_shape(target: ir.Value | None) -> bool:
    concat = editing.producer(target, "Concat")
    return concat is not None and len(concat.inputs) == 2
