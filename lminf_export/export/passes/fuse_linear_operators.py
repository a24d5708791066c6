"""Projections become operators of `lminf`, and what is added to them becomes part of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, ensure_sound, require
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
_OPERATORS = (LINEAR, LINEAR_ADD, LINEAR_NBITS, LINEAR_NBITS_ADD)
_PRODUCTS = {
    *((DOMAIN, kind) for kind in _OPERATORS),
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


class FuseLinearOperatorsPass(ir.passes.InPlacePass):
    """Turn products with weights into operators of lminf, and attach their bodies.

    Gemm(x, weight[, bias]) becomes Linear or LinearAdd; MatMulNBits LinearNBits or
    LinearNBitsAdd. A residual stream that is added to a product without a bias is its addend.

    Requires: products read rows (`KeepTokensFlatPass` has run), and their weights are attached:
        quantised ones are no longer a Gemm's.
    Ensures: a Gemm that is left multiplies no float weight of the graph, and no MatMulNBits is
        left; every new operator has a body that takes its inputs.
    """

    def requires(self, model: ir.Model) -> None:
        for node, found in _projections(model.graph):
            x, weight = found.inputs[:2]
            name = node.outputs[0].name
            require(editing.rank(x) in (-1, 2), f"{name} multiplies tokens that are no rows")
            attached = weight is not None and weight.const_value is not None
            require(attached, f"{name} reads a weight that has no data yet")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        count = 0
        for product, projection in _projections(model.graph):
            _fuse(model.graph, product, projection)
            count += 1
        _attach_bodies(model)
        return ir.passes.PassResult(model, count > 0)

    def ensures(self, model: ir.Model) -> None:
        left = [node.outputs[0].name for node, _ in _projections(model.graph)]
        ensure(not left, f"products are no operators of {DOMAIN}: {left[:3]}")
        for node in model.graph:
            if node.domain == DOMAIN and node.op_type in _OPERATORS:
                body = model.functions.get(node.op_identifier())
                fits = body is not None and len(body.inputs) >= len(node.inputs)
                ensure(fits, f"no body of {node.op_type} takes {len(node.inputs)} inputs")
        ensure_sound(model)


def _projections(graph: ir.Graph) -> Iterator[tuple[ir.Node, _Projection]]:
    """Yield the products that become operators, in order, each as the graph is by then."""
    for node in list(graph):
        found = _dense(node) or _quantised(node)
        if found is not None:
            yield node, found


def _fuse(graph: ir.Graph, product: ir.Node, projection: _Projection) -> None:
    """Replace a product without an addend together with the Add of a residual stream."""
    addend = projection.addend
    add, residual = (None, None) if addend is not None else _residual(product)
    addend = addend if add is None else residual
    kind = projection.plain if addend is None else projection.adding
    inputs = [*projection.inputs, *([] if addend is None else [addend]), *projection.behind]
    node = ir.Node(DOMAIN, kind, inputs, projection.attributes)
    if add is None:
        editing.replace(graph, product, [node])
    else:
        editing.replace(graph, add, [node], absorbed=[product])


def _dense(node: ir.Node) -> _Projection | None:
    if not _is_projection(node):
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return _Projection(LINEAR, LINEAR_ADD, tuple(node.inputs[:2]), bias)


def _quantised(node: ir.Node) -> _Projection | None:
    if not editing.is_op(node, _NBITS, CONTRIB_DOMAIN):
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
    if not editing.is_op(node, "Gemm") or not 2 <= len(node.inputs) <= 3:
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


def _residual(product: ir.Node) -> tuple[ir.Node | None, ir.Value | None]:
    """Return the Add that only adds another matrix of that shape, and that matrix."""
    add, other = editing.add_of(product.outputs[0]) or (None, None)
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
    if editing.is_op(node, "Reshape"):
        target = editing.const_ints(node.inputs[1])
        return target is not None and len(target) == 2
    if editing.is_op(node, "Add"):
        return all(part is not None and _is_rows(part) for part in node.inputs)
    return False


def _attach_bodies(model: ir.Model) -> None:
    used = [node for node in model.graph if node.domain == DOMAIN]
    kinds = {node.op_type for node in used}
    protos = [linear_body(kind) for kind in (LINEAR, LINEAR_ADD) if kind in kinds]
    for kind, inputs in ((LINEAR_NBITS, 3), (LINEAR_NBITS_ADD, 4)):
        nodes = [node for node in used if node.op_type == kind]
        if nodes:
            # One body for all: a node without zero points leaves the last input out.
            zero_points = any(len(node.inputs) > inputs for node in nodes)
            half_scales = any(_scales_are_narrow(node) for node in nodes)
            protos.append(nbits_body(kind, zero_points=zero_points, half_scales=half_scales))
    for proto in protos:
        editing.attach_function(model, proto)
    if used:
        model.opset_imports[DOMAIN] = 1


def _scales_are_narrow(node: ir.Node) -> bool:
    """Say whether a product in blocks has scales of another type than the model's float32."""
    scales, x = node.inputs[2], node.inputs[0]
    assert scales is not None
    wide = x is None or x.dtype != ir.DataType.FLOAT16
    return wide and scales.dtype == ir.DataType.FLOAT16
