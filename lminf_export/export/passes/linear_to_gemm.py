"""Projections read weights in the checkpoint's own layout: (out, in), through Gemm transB."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def linear_to_gemm(model: ir.Model) -> None:
    """Turn MatMul(x, Transpose(weight)) [+ bias] into Gemm(x, weight, bias, transB=1).

    A Transpose of a weight would be folded by a runtime into a second copy of it, and a tied
    embedding would be stored twice. Gemm takes matrices, so x (…, in) is flattened before
    and the result unflattened after; projections of one x share the flattening.

    Requires: weights are rank-2 initializers.
    Ensures: no Transpose of an initializer feeds a MatMul.
    """
    graph = model.graph
    flat: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        weight = _projection_weight(node)
        if weight is None:
            continue
        x, result = node.inputs[0], node.outputs[0]
        assert x is not None
        assert weight.shape is not None
        out_features, in_features = weight.shape.numpy()
        new_nodes: list[ir.Node] = []
        if x not in flat:
            flatten = ir.node("Reshape", [x, _constant([-1, in_features], new_nodes)])
            new_nodes.append(flatten)
            flat[x] = flatten.outputs[0]
        add, bias = _bias_of(result)
        inputs = [flat[x], weight, *([bias] if bias is not None else [])]
        gemm = ir.node("Gemm", inputs, attributes={"transB": 1})
        shape = ir.node("Shape", [_rows_of(graph, x)], attributes={"start": 0, "end": 2})
        width = _constant([out_features], new_nodes)
        target = ir.node("Concat", [shape.outputs[0], width], attributes={"axis": 0})
        # allowzero: a step may ask for no logits at all, and then 0 means 0.
        unflatten = ir.node(
            "Reshape", [gemm.outputs[0], target.outputs[0]], attributes={"allowzero": 1}
        )
        new_nodes += [gemm, shape, target, unflatten]
        replaced = add or node
        final, old = unflatten.outputs[0], replaced.outputs[0]
        final.shape, final.type, final.name = old.shape, old.type, old.name
        graph.insert_before(replaced, new_nodes)
        ir.convenience.replace_all_uses_with(old, final, replace_graph_outputs=True)
        if add is not None:
            graph.remove(add, safe=True)
        graph.remove(node, safe=True)


def _projection_weight(node: ir.Node) -> ir.Value | None:
    if node.op_type != "MatMul" or node.domain or node.inputs[1] is None:
        return None
    transpose = node.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    weight = transpose.inputs[0]
    if weight is None or not weight.is_initializer():
        return None
    ranks = [len(v.shape) if v is not None and v.shape else 0 for v in (node.inputs[0], weight)]
    return weight if ranks == [3, 2] else None


def _rows_of(graph: ir.Graph, x: ir.Value) -> ir.Value:
    """Return a graph input whose two dimensions are the leading ones of x, or x itself.

    Reading them from an input lets all projections share one Shape node.
    """
    assert x.shape is not None
    for value in graph.inputs:
        if value.shape is not None and len(value.shape) == 2 and value.shape[:] == x.shape[:2]:
            return value
    return x


def _bias_of(result: ir.Value) -> tuple[ir.Node | None, ir.Value | None]:
    uses = list(result.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or result.is_graph_output():
        return None, None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    is_bias = other is not None and other.is_initializer() and len(other.shape or ()) == 1
    return (add, other) if is_bias else (None, None)


def _constant(values: list[int], nodes: list[ir.Node]) -> ir.Value:
    node = ir.node(
        "Constant", [], attributes={"value": ir.tensor(np.array(values, dtype=np.int64))}
    )
    nodes.append(node)
    return node.outputs[0]
