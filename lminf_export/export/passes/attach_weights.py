"""A graph's initializers, pointed into the files that hold their bytes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from lminf_export.tensors.stored import StoredTensor


def attach(model: ir.Model, stored: Mapping[str, StoredTensor]) -> None:
    """Point a graph's initializers into a safetensors file beside the model.

    Args:
        model: its initializers without data whose names are keys of `stored`.
        stored: where each tensor is.
    """
    for name, tensor in stored.items():
        value = model.graph.initializers[name]
        assert value.dtype is not None
        value.const_value = ir.ExternalTensor(
            tensor.path.name,
            tensor.offset,
            tensor.length,
            value.dtype,
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=tensor.path.parent,
        )
