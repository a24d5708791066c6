"""Reshape targets put together from Shape nodes become one constant."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def constant_reshape_targets(model: ir.Model) -> None:
    """Replace a computed reshape target by a constant where symbols allow it.

    Requires: values carry the symbolic shapes of the trace.
    Ensures: a target dimension is its number, 0 where it is the input's own dimension at
        that place, and −1 at most once; anything else is left alone.
    """
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.domain:
            continue
        target = _target(node.inputs[0], node.outputs[0])
        if target is None:
            continue
        constant = ir.node(
            "Constant", [], attributes={"value": ir.tensor(np.array(target, dtype=np.int64))}
        )
        model.graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


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
