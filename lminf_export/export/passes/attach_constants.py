"""The plan's constants become data of the graph: rotary tables, slopes, logits of sinks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor

from lminf_export.errors import ExportError
from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, require


@dataclass(frozen=True)
class AttachConstantsPass(ir.passes.InPlacePass):
    """Give initializers their values, kept in the graph's own file.

    Requires: a value takes the bytes of its initializer; those the graph does not use are left.
    Ensures: every initializer has data.

    Attributes:
        constants: initializer's name → its value.

    Raises:
        ExportError: an initializer is left that nothing gave a value.
    """

    constants: Mapping[str, Tensor]

    def requires(self, model: ir.Model) -> None:
        for name, tensor in self.constants.items():
            value = model.graph.initializers.get(name)
            size = tensor.numel() * tensor.element_size()
            fits = value is None or editing.num_bytes(value) == size
            require(fits, f"the constant {name} takes {size} bytes, its initializer others")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        initializers = model.graph.initializers
        for name, tensor in self.constants.items():
            if name in initializers:
                data = ir.tensor(tensor, name=name)
                initializers[name].const_value = data
        empty = _empty(model)
        if empty:
            raise ExportError(f"the graph has constants without a value: {', '.join(empty[:3])}")
        return ir.passes.PassResult(model, bool(self.constants))

    def ensures(self, model: ir.Model) -> None:
        ensure(not _empty(model), f"initializers have no data: {_empty(model)[:3]}")


def _empty(model: ir.Model) -> list[str]:
    return [name for name, value in model.graph.initializers.items() if value.const_value is None]
