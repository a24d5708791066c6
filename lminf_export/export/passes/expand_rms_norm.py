"""RMSNormalization becomes the operators it is made of, for parsers that do not know it."""

from __future__ import annotations

import onnx_ir as ir

from lminf_export.export.passes.checking import ensure, ensure_sound, require
from lminf_export.export.passes.editing import is_op, name_of

_RMS_NORM = "RMSNormalization"
_FLOAT32 = int(ir.DataType.FLOAT)


class ExpandRmsNormPass(ir.passes.InPlacePass):
    """Write norms as x · scale / √(mean(x²) + ε), the mean in float32, in operators of opset 18.

    TensorRT's parsers know the operator from 10.15 on.

    Requires: norms are over the last axis, of known types, and have a name.
    Ensures: no norm is left.
    """

    def requires(self, model: ir.Model) -> None:
        for node in _norms(model):
            x, scale = node.inputs
            name = node.outputs[0].name
            axis = node.attributes.get_int("axis", -1)
            require(axis == -1, f"the norm {name} is over axis {axis}")
            typed = [value for value in (x, scale) if value is not None and value.dtype is not None]
            require(name and typed, f"the norm {name} has no name or no type")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        norms = _norms(model)
        for node in norms:
            _expand(model, node)
        return ir.passes.PassResult(model, bool(norms))

    def ensures(self, model: ir.Model) -> None:
        ensure(not _norms(model), f"{len(_norms(model))} norms are left")
        ensure_sound(model)


def _norms(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if is_op(node, _RMS_NORM)]


def _expand(model: ir.Model, node: ir.Node) -> None:
    x, scale = node.inputs
    assert x is not None
    assert scale is not None
    name = name_of(node.outputs[0])
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    dtype = x.dtype or scale.dtype
    assert dtype is not None
    tape = ir.tape.Tape(model.graph)
    wide = tape.op("Cast", [x], {"to": _FLOAT32})
    square = tape.op("Mul", [wide, wide])
    axes = tape.initializer(ir.tensor([-1], ir.DataType.INT64, name=f"{name}.axes"))
    mean = tape.op("ReduceMean", [square, axes], {"keepdims": 1})
    tiny = tape.initializer(ir.tensor([epsilon], ir.DataType.FLOAT, name=f"{name}.epsilon"))
    root = tape.op("Sqrt", [tape.op("Add", [mean, tiny])])
    narrow = tape.op("Cast", [tape.op("Div", [wide, root])], {"to": int(dtype)})
    result = tape.op("Mul", [narrow, scale])
    for index, value in enumerate(part for made in tape.nodes for part in made.outputs):
        value.name = f"{name}.{index}"
    ir.convenience.replace_nodes_and_values(
        model.graph, node, [node], tape.nodes, node.outputs, [result]
    )
