"""Projections read weights in the checkpoint's own layout: (out, in), through Gemm transB."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, ensure_sound, require


class LinearToGemmPass(ir.passes.InPlacePass):
    """Turn MatMul(x, Transpose(weight)) [+ bias] into Gemm(x, weight, bias, transB=1).

    A Transpose of a weight would be folded by a runtime into a second copy of it, and a tied
    embedding would be stored twice. Gemm takes matrices, so x (B, S, in) is flattened before and
    the result unflattened after; projections of one x share the flattening.
    `matmul_add_to_gemm` of onnxscript 0.7.2 does not fire: it takes an x of rank 2 and a bias.

    Requires: x and weight of every such product have known shapes.
    Ensures: no product of batches is left that reads a transposed weight.
    """

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            weight = _transposed_weight(node)
            if weight is not None:
                known = editing.rank(node.inputs[0]) >= 0 and editing.num_bytes(weight) is not None
                require(known, f"{node.outputs[0].name} multiplies tensors of unknown shape")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        flat: dict[ir.Value, ir.Value] = {}
        products = [(node, weight) for node in graph if (weight := projection_weight(node))]
        for node, weight in products:
            _to_gemm(graph, node, weight, flat)
        return ir.passes.PassResult(model, bool(products))

    def ensures(self, model: ir.Model) -> None:
        require_gemm(model, ensure)
        ensure_sound(model)


def _to_gemm(
    graph: ir.Graph, product: ir.Node, weight: ir.Value, flat: dict[ir.Value, ir.Value]
) -> None:
    """Replace one product, and the Add of its bias.

    Args:
        graph: of the product.
        product: MatMul(x, Transpose(weight)).
        weight: (out, in).
        flat: x → its rows, as far as they are at hand; gets those of this product.
    """
    x = product.inputs[0]
    assert x is not None
    assert weight.shape is not None
    out_features, in_features = weight.shape.numpy()
    new: list[ir.Node] = []
    if x not in flat:
        rows_target = editing.ints(-1, in_features)
        flatten = ir.node("Reshape", [x, rows_target.outputs[0]])
        new += [rows_target, flatten]
        flat[x] = flatten.outputs[0]
    add, bias = _bias_of(product.outputs[0]) or (None, None)
    width = editing.ints(out_features)
    gemm = ir.node("Gemm", [flat[x], weight, *([bias] if bias else [])], {"transB": 1})
    shape = ir.node("Shape", [_rows_of(graph, x)], {"start": 0, "end": 2})
    target = ir.node("Concat", [shape.outputs[0], width.outputs[0]], {"axis": 0})
    # allowzero: a step may ask for no logits at all, and then 0 means 0.
    unflatten = ir.node("Reshape", [gemm.outputs[0], target.outputs[0]], {"allowzero": 1})
    new += [width, gemm, shape, target, unflatten]
    if add is None:
        editing.replace(graph, product, new)
    else:
        editing.replace(graph, add, new, absorbed=[product])


def require_gemm(model: ir.Model, check: Callable[[object, str], None]) -> None:
    """Check that `LinearToGemmPass` has nothing to do."""
    for node in model.graph:
        done = projection_weight(node) is None
        check(done, f"{node.outputs[0].name} is no Gemm but reads a transposed weight")


def projection_weight(node: ir.Node) -> ir.Value | None:
    """Return the matrix that a product of batches reads transposed, None for any other node."""
    weight = _transposed_weight(node)
    if weight is None or editing.rank(node.inputs[0]) != 3 or editing.rank(weight) != 2:
        return None
    return weight


def _transposed_weight(node: ir.Node) -> ir.Value | None:
    if not editing.is_op(node, "MatMul"):
        return None
    transpose = editing.producer(node.inputs[1], "Transpose")
    weight = transpose.inputs[0] if transpose is not None else None
    return weight if weight is not None and weight.is_initializer() else None


def _rows_of(graph: ir.Graph, x: ir.Value) -> ir.Value:
    """Return a graph input whose two dimensions are the leading ones of x, or x itself.

    Reading them from an input lets all projections share one Shape node.
    """
    assert x.shape is not None
    for value in graph.inputs:
        if value.shape is not None and len(value.shape) == 2 and value.shape[:] == x.shape[:2]:
            return value
    return x


def _bias_of(result: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """Return the Add that alone reads a product, and the vector it adds."""
    found = editing.add_of(result)
    return found if found is not None and editing.is_weight(found[1], 1) else None
