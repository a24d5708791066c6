"""Dimensions that have one size in an engine become numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.errors import EngineError
from lminf_export.export.passes.checking import ensure, require


@dataclass(frozen=True)
class FreezeSizesPass(ir.passes.InPlacePass):
    """Make symbolic dimensions of inputs and outputs numbers.

    Requires: sizes are at least 1; the rings are inputs and outputs of the graph.
    Ensures: no input or output has one of the symbols.

    Attributes:
        sizes: symbol → its size.
        rings: names of inputs and outputs that must have a shape of rank 4.

    Raises:
        EngineError: a ring has none.
    """

    sizes: Mapping[str, int]
    rings: Collection[str]

    def requires(self, model: ir.Model) -> None:
        require(all(size >= 1 for size in self.sizes.values()), f"sizes below 1: {self.sizes}")
        missing = {*self.rings} - {value.name for value in _ends(model)}
        require(not missing, f"rings that are no input or output: {sorted(missing)[:3]}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        values = {value.name: value for value in _ends(model)}
        for name in self.rings:
            shape = values[name].shape
            if shape is None or len(shape) != 4:
                raise EngineError(f"{name} has no shape of rank 4; export the model again")
        for value in values.values():
            if value.shape is not None:
                value.shape = ir.Shape(self._size(dim) for dim in value.shape)
        return ir.passes.PassResult(model, bool(self.sizes))

    def ensures(self, model: ir.Model) -> None:
        for value in _ends(model):
            left = {dim.value for dim in value.shape or () if isinstance(dim, ir.SymbolicDim)}
            open_ones = left & self.sizes.keys()
            ensure(not open_ones, f"{value.name} still has the dimensions {open_ones}")

    def _size(self, dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int):
            return dim
        return self.sizes.get(dim.value, dim.value) if dim.value is not None else None


def _ends(model: ir.Model) -> tuple[ir.Value, ...]:
    return (*model.graph.inputs, *model.graph.outputs)
