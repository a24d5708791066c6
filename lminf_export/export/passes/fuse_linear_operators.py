"""Projections become operators of `lminf`, and what is added to them becomes part of them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.operator.contract import DOMAIN
from lminf_export.operator.linear_bodies import (
    CONTRIB_DOMAIN,
    LINEAR,
    LINEAR_ADD,
    LINEAR_NBITS,
    LINEAR_NBITS_ADD,
    NBITS_ATTRIBUTES,
    linear_body,
    nbits_body,
)

# What the kernel reads; in other types a projection stays the Gemm it is.
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_NBITS = "MatMulNBits"
_PRODUCTS = {
    *((DOMAIN, kind) for kind in (LINEAR, LINEAR_ADD, LINEAR_NBITS, LINEAR_NBITS_ADD)),
    ("", "Gemm"),
    (CONTRIB_DOMAIN, _NBITS),
}


@dataclass(frozen=True)
class _Projection:
    """A product with a weight: its operators without and with an addend, and what they take."""

    plain: str
    adding: str
    inputs: tuple[ir.Value | None, ...]
    addend: ir.Value | None
    behind: tuple[ir.Value, ...] = ()
    attributes: tuple[ir.Attr, ...] = ()


def own_linear(model: ir.Model) -> None:
    """Turn products with weights into operators of lminf, and attach their bodies.

    Gemm(x, weight[, bias]) becomes Linear or LinearAdd; MatMulNBits LinearNBits or
    LinearNBitsAdd. A residual stream that is added to a product without a bias is its addend.

    Requires: `stay_flat` has run, weights are as they will be read (quantised ones are no
        longer a Gemm's).
    Ensures: the same values; a Gemm that is left multiplies no float weight of the graph, and no
        MatMulNBits is left.
    """
    graph = model.graph
    for product in list(graph):
        found = _dense(product) or _quantised(product)
        if found is None:
            continue
        result, addend = product.outputs[0], found.addend
        add, residual = (None, None) if addend is not None else _residual(graph, product)
        replaced = product
        if add is not None:
            addend, replaced, result = residual, add, add.outputs[0]
        kind = found.plain if addend is None else found.adding
        added = () if addend is None else (addend,)
        inputs = [*found.inputs, *added, *found.behind]
        node = ir.Node(DOMAIN, kind, inputs, found.attributes)
        new = node.outputs[0]
        new.shape, new.type, new.name = result.shape, result.type, result.name
        graph.insert_before(replaced, node)
        ir.convenience.replace_all_uses_with(result, new, replace_graph_outputs=True)
        graph.remove([product] if add is None else [add, product], safe=True)
    _attach_bodies(model)


def _dense(node: ir.Node) -> _Projection | None:
    if not _is_projection(node):
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return _Projection(LINEAR, LINEAR_ADD, tuple(node.inputs[:2]), bias)


def _quantised(node: ir.Node) -> _Projection | None:
    if (node.domain, node.op_type) != (CONTRIB_DOMAIN, _NBITS):
        return None
    inputs = [*node.inputs, *[None] * (6 - len(node.inputs))]
    zero_points, bias = inputs[3], inputs[5]
    return _Projection(
        LINEAR_NBITS,
        LINEAR_NBITS_ADD,
        tuple(inputs[:3]),
        bias,
        () if zero_points is None else (zero_points,),
        tuple(node.attributes[name] for name in NBITS_ATTRIBUTES),
    )


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


def _residual(graph: ir.Graph, product: ir.Node) -> tuple[ir.Node | None, ir.Value | None]:
    """Return the Add that only adds another matrix of that shape, and that matrix."""
    result = product.outputs[0]
    uses = list(result.uses())
    if len(uses) != 1 or result.is_graph_output():
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
    if (node.domain, node.op_type) in _PRODUCTS:
        return True
    if node.op_type == "Reshape" and not node.domain:
        target = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] else None
        return target is not None and target.size == 2
    if node.op_type == "Add" and not node.domain:
        return all(part is not None and _is_rows(part) for part in node.inputs)
    return False


def _attach_bodies(model: ir.Model) -> None:
    used = {node.op_type: node for node in model.graph if node.domain == DOMAIN}
    protos = [linear_body(kind) for kind in (LINEAR, LINEAR_ADD) if kind in used]
    for kind, inputs in ((LINEAR_NBITS, 3), (LINEAR_NBITS_ADD, 4)):
        if kind in used:
            # A bundle's weights have zero points or not, all of them.
            protos.append(nbits_body(kind, zero_points=len(used[kind].inputs) > inputs))
    for function in map(ir.serde.deserialize_function, protos):
        model.functions[function.identifier()] = function
    if used:
        model.opset_imports[DOMAIN] = 1
