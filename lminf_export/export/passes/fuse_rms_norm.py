"""x · rsqrt(mean(x²) + ε) · weight, seven nodes as traced, becomes one RMSNormalization."""

from __future__ import annotations

from typing import TypeGuard

import onnx_ir as ir

from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, require
from lminf_export.export.passes.editing import const_number, producer

_FIRST_OPSET = 23


class FuseRmsNormPass(ir.passes.InPlacePass):
    """Replace the traced form of an RMS norm by the standard operator (opset 23).

    Matches scale · cast?(x₃₂ · 1/√(mean(x₃₂²) + ε)) with x₃₂ = x or cast(x), over the last
    axis: the statistics stay in float32 (stash_type 1) and the product with the scale in its
    type, as traced. The scale is a weight, or a number more than one (Gemma's 1 + weight), which
    runtimes compute once when they load. Nodes that served only the norm are left to dead-code
    removal. `fuse_rms_normalization` of onnxscript 0.7.2 finds these too, but also fuses a scale of
    another type than x, which this pass leaves as traced.

    Requires: the graph's opset has the operator.
    Ensures: the form is nowhere left; a norm has a vector of x's type as its scale.
    """

    def requires(self, model: ir.Model) -> None:
        opset = model.opset_imports.get("", 0)
        require(opset >= _FIRST_OPSET, f"opset {opset} has no RMSNormalization")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        changed = False
        for node in list(model.graph):
            match = _match(node)
            if match is None:
                continue
            x, weight, epsilon = match
            attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
            norm = ir.node("RMSNormalization", [x, weight], attributes)
            editing.replace(model.graph, node, [norm], keep_name=False)
            changed = True
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            ensure(_match(node) is None, f"{node.outputs[0].name} is a norm that was not fused")
            if editing.is_op(node, "RMSNormalization"):
                x, weight = node.inputs
                fits = _is_scale(weight) and x is not None and x.dtype == weight.dtype
                ensure(fits, f"{node.outputs[0].name} has no vector of its type as its scale")


def _match(node: ir.Node) -> tuple[ir.Value, ir.Value, float] | None:
    """Return x, scale and ε of the norm that ends with this product."""
    if not editing.is_op(node, "Mul") or node.outputs[0].is_graph_output():
        return None
    scale, normed = node.inputs
    if not _is_scale(scale):
        scale, normed = normed, scale
    cast = producer(normed, "Cast")
    product = producer(normed if cast is None else cast.inputs[0], "Mul")
    if not _is_scale(scale) or product is None:
        return None
    for wide, factor in (product.inputs, product.inputs[::-1]):
        epsilon = _epsilon_of_rsqrt(factor, wide)
        if epsilon is None:
            continue
        # Without a cast back the result is of the type that the mean was taken in.
        x = wide if cast is None else _through_cast(wide)
        if x is not None and x.dtype == scale.dtype:
            return x, scale, epsilon
    return None


def _is_scale(value: ir.Value | None) -> TypeGuard[ir.Value]:
    """Say whether a value is a vector that is a weight, cast or not, or a number more than one."""
    add = producer(value, "Add")
    if add is None:
        return editing.is_weight(value, 1)
    numbers = [term for term in add.inputs if editing.const_number(term) is not None]
    vectors = [term for term in add.inputs if editing.is_weight(_through_cast(term), 1)]
    return len(numbers) == len(vectors) == 1 and editing.rank(value) == 1


def _through_cast(value: ir.Value | None) -> ir.Value | None:
    cast = producer(value, "Cast")
    return value if cast is None else cast.inputs[0]


def _epsilon_of_rsqrt(value: ir.Value | None, x: ir.Value | None) -> float | None:
    """Return ε if value is 1/√(mean(x²) + ε) over the last axis."""
    for op_type in ("Reciprocal", "Sqrt"):
        node = producer(value, op_type)
        if node is None:
            return None
        value = node.inputs[0]
    add = producer(value, "Add")
    if add is None:
        return None
    mean, epsilon = add.inputs
    reduce = producer(mean, "ReduceMean")
    if reduce is None or const_number(reduce.inputs[1]) != -1:
        return None
    power = producer(reduce.inputs[0], "Pow")
    if power is None or power.inputs[0] is not x or const_number(power.inputs[1]) != 2:
        return None
    return const_number(epsilon)
