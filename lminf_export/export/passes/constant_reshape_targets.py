"""Reshape targets put together from Shape nodes become one constant."""

from __future__ import annotations

import onnx_ir as ir

from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, require


class ConstantReshapeTargetsPass(ir.passes.InPlacePass):
    """Replace a computed reshape target by a constant where symbols allow it.

    Requires: the inputs carry the symbolic shapes of the trace.
    Ensures: a constant target is the result's shape as far as that is known: a dimension is its
        number, 0 where it is the input's own at that place, and −1 at most once.
    """

    def requires(self, model: ir.Model) -> None:
        for value in model.graph.inputs:
            require(value.shape is not None, f"the input {value.name} has no shape")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        changed = False
        for node in list(model.graph):
            if not editing.is_op(node, "Reshape"):
                continue
            target = _target(node.inputs[0], node.outputs[0])
            if target is None:
                continue
            constant = editing.ints(*target)
            model.graph.insert_before(node, constant)
            node.replace_input_with(1, constant.outputs[0])
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
            changed = True
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if editing.is_op(node, "Reshape"):
                target, result = editing.const_ints(node.inputs[1]), node.outputs[0]
                fits = target is None or _fits(target, result)
                ensure(fits, f"{result.name} of shape {result.shape} is reshaped to {target}")


def _target(source: ir.Value | None, result: ir.Value) -> list[int] | None:
    if source is None or source.shape is None or result.shape is None:
        return None
    target = []
    for axis, dim in enumerate(result.shape):
        if isinstance(dim, int):
            target.append(dim)
        elif axis < len(source.shape) and _same(dim, source.shape[axis]):
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None


def _same(a: object, b: object) -> bool:
    return isinstance(a, ir.SymbolicDim) and isinstance(b, ir.SymbolicDim) and a.value == b.value


def _fits(target: list[int], result: ir.Value) -> bool:
    if target.count(-1) > 1:
        return False
    if result.shape is None:
        return True
    pairs = zip(target, result.shape, strict=False)
    known = [(number, dim) for number, dim in pairs if number > 0 and isinstance(dim, int)]
    return len(target) == len(result.shape) and all(number == dim for number, dim in known)
