"""Projections become `lminf::Linear`, and what is added to them becomes part of them."""

from __future__ import annotations

import onnx_ir as ir

from lminf_export.linear_function import LINEAR, LINEAR_ADD, linear_body
from lminf_export.op import DOMAIN

# What the kernel reads; in other types a projection stays the Gemm it is.
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def own_linear(model: ir.Model) -> None:
    """Turn Gemm(x, weight[, bias]) into Linear or LinearAdd, and attach their bodies.

    A residual stream that is added to a product without a bias is the product's addend.

    Requires: `stay_flat` has run, weights are as they will be read (quantised ones are no
        longer a Gemm's).
    Ensures: the same values; a Gemm that is left multiplies no float weight of the graph.
    """
    graph = model.graph
    for gemm in [node for node in graph if _is_projection(node)]:
        result = gemm.outputs[0]
        inputs, replaced = list(gemm.inputs), gemm
        add, addend = _residual(graph, gemm)
        if add is not None:
            inputs, replaced, result = [*inputs[:2], addend], add, add.outputs[0]
        kind = LINEAR_ADD if len(inputs) == 3 else LINEAR
        node = ir.node(kind, inputs, domain=DOMAIN)
        new = node.outputs[0]
        new.shape, new.type, new.name = result.shape, result.type, result.name
        graph.insert_before(replaced, node)
        ir.convenience.replace_all_uses_with(result, new, replace_graph_outputs=True)
        graph.remove([gemm] if add is None else [add, gemm], safe=True)
    _attach_bodies(model)


def _is_projection(node: ir.Node) -> bool:
    if node.op_type != "Gemm" or node.domain or not 2 <= len(node.inputs) <= 3:
        return False
    weight, attributes = node.inputs[1], node.attributes
    return (
        weight is not None
        and weight.is_initializer()
        and weight.dtype in _TYPES
        and attributes.get_int("transB", 0) == 1
        and attributes.get_int("transA", 0) == 0
        and attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
        and _is_bias(node)
    )


def _is_bias(gemm: ir.Node) -> bool:
    """Say whether the third input is missing or one number for each output feature."""
    if len(gemm.inputs) == 2:
        return True
    bias, weight = gemm.inputs[2], gemm.inputs[1]
    if bias is None or bias.shape is None or weight is None or weight.shape is None:
        return False
    return len(bias.shape) == 1 and bias.shape[0] == weight.shape[0]


def _residual(graph: ir.Graph, gemm: ir.Node) -> tuple[ir.Node | None, ir.Value | None]:
    """Return the Add that only adds another matrix of that shape, and that matrix."""
    result = gemm.outputs[0]
    uses = list(result.uses())
    if len(gemm.inputs) == 3 or len(uses) != 1 or result.is_graph_output():
        return None, None
    add = uses[0].node
    if add.op_type != "Add" or add.domain or add.graph is not graph:
        return None, None
    other = add.inputs[1 - uses[0].idx]
    return (add, other) if other is not None and _is_rows(other) else (None, None)


def _is_rows(value: ir.Value) -> bool:
    """Say whether a value is a sum of products, or the embeddings' rows: (M, N) by construction.

    Shapes of rows are not always known by name; what a residual stream is made of is.
    """
    node = value.producer()
    if node is None:
        return False
    if (node.domain, node.op_type) in ((DOMAIN, LINEAR), (DOMAIN, LINEAR_ADD), ("", "Gemm")):
        return True
    if node.op_type == "Reshape" and not node.domain:
        target = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] else None
        return target is not None and target.size == 2
    if node.op_type == "Add" and not node.domain:
        return all(part is not None and _is_rows(part) for part in node.inputs)
    return False


def _attach_bodies(model: ir.Model) -> None:
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for op_type in {LINEAR, LINEAR_ADD} & used:
        function = ir.serde.deserialize_function(linear_body(op_type))
        model.functions[function.identifier()] = function
    if used:
        model.opset_imports[DOMAIN] = 1
