"""A graph's initializers, pointed into the files that hold their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, require
from lminf_export.tensors.stored import StoredTensor


@dataclass(frozen=True)
class AttachWeightsPass(ir.passes.InPlacePass):
    """Point initializers into safetensors files beside the model.

    Requires: they are the graph's, without data, and take as many bytes as are stored.
    Ensures: each has its bytes in the file.

    Attributes:
        stored: initializer's name → where its bytes are.
    """

    stored: Mapping[str, StoredTensor]

    def requires(self, model: ir.Model) -> None:
        for name, tensor in self.stored.items():
            value = model.graph.initializers.get(name)
            require(value is not None, f"the graph has no initializer {name}")
            assert value is not None
            require(value.const_value is None, f"the initializer {name} has data already")
            size = editing.num_bytes(value)
            require(size == tensor.length, f"{name} takes {size} bytes, stored are {tensor.length}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for name, tensor in self.stored.items():
            value = model.graph.initializers[name]
            assert value.dtype is not None
            assert value.shape is not None
            value.const_value = ir.ExternalTensor(
                tensor.path.name,
                tensor.offset,
                tensor.length,
                value.dtype,
                shape=value.shape,
                name=name,
                base_dir=tensor.path.parent,
            )
        return ir.passes.PassResult(model, bool(self.stored))

    def ensures(self, model: ir.Model) -> None:
        for name, tensor in self.stored.items():
            data = model.graph.initializers[name].const_value
            place = (data.location, data.offset) if isinstance(data, ir.ExternalTensor) else None
            ensure(place == (tensor.path.name, tensor.offset), f"{name} is not read from its file")
