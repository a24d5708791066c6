"""A graph's inputs and outputs get exactly the shapes of the contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.errors import ExportError
from lminf_export.export.onnx_dtypes import onnx_dtype
from lminf_export.export.passes.checking import ensure, require
from lminf_export.operator.bindings import TensorSpec


@dataclass(frozen=True)
class DeclareInputsAndOutputsPass(ir.passes.InPlacePass):
    """Declare the shapes of inputs and outputs.

    Requires: the graph has as many as the contract.
    Ensures: their names, types and shapes are the contract's.

    Attributes:
        inputs: the contract's.
        outputs: the contract's.

    Raises:
        ExportError: one has another name or type than the contract asks for.
    """

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]

    def requires(self, model: ir.Model) -> None:
        for values, specs, what in (
            (model.graph.inputs, self.inputs, "inputs"),
            (model.graph.outputs, self.outputs, "outputs"),
        ):
            same = len(values) == len(specs)
            require(same, f"the graph has {len(values)} {what}, the contract {len(specs)}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for value, spec in self._pairs(model):
            if not _is_of(value, spec):
                raise ExportError(
                    f"the graph has {value.name!r} of {value.dtype} where the contract has "
                    f"{spec.name!r} of {spec.dtype}"
                )
            value.shape = ir.Shape(spec.shape)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        for value, spec in self._pairs(model):
            same = _is_of(value, spec) and value.shape == ir.Shape(spec.shape)
            ensure(same, f"{value.name} of shape {value.shape} is not {spec}")

    def _pairs(self, model: ir.Model) -> Iterator[tuple[ir.Value, TensorSpec]]:
        yield from zip(model.graph.inputs, self.inputs, strict=True)
        yield from zip(model.graph.outputs, self.outputs, strict=True)


def _is_of(value: ir.Value, spec: TensorSpec) -> bool:
    return value.name == spec.name and value.dtype == onnx_dtype(spec.dtype)
