"""A graph as an export writes it, over weights that are not there."""

from __future__ import annotations

import math
from pathlib import Path

import onnx

from lminf_export.export.graph import save_graph
from lminf_export.export.passes import pipelines
from lminf_export.export.trace.tracing import Trace
from lminf_export.models.base import AttentionPlan
from lminf_export.operator import contract
from lminf_export.tensors.dtypes import item_size, safetensors_name
from lminf_export.tensors.files import FILE_NAME
from lminf_export.tensors.stored import StoredTensor


def export_without_weights(traced: Trace, plan: AttentionPlan, folder: Path) -> onnx.GraphProto:
    """Write a graph as an export does, checks and all, over a file of weights that is a hole."""
    pipelines.run(traced.model, pipelines.optimized())
    dtype = traced.contract.dtype
    initializers, stored, offset = traced.model.graph.initializers, {}, 0
    for name in (name for name in traced.weight_names if name in initializers):
        shape = tuple(int(dim) for dim in initializers[name].shape.numpy())
        length = math.prod(shape) * item_size(dtype)
        stored[name] = StoredTensor(
            folder / FILE_NAME, safetensors_name(dtype), shape, offset, length
        )
        offset += length
    with (folder / FILE_NAME).open("wb") as file:
        file.truncate(offset)
    pipelines.run(traced.model, pipelines.attached(stored))
    save_graph(traced, plan, folder / "model.onnx", metadata={})
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    functions = {function.name for function in model.functions}
    int8_cache = traced.contract.int8_cache
    kinds = {
        contract.op_type(int8_cache=int8_cache, key_bias=key_bias)
        for key_bias in (False, int8_cache)
    }
    assert kinds & functions
    assert functions <= {*kinds, "Linear", "LinearAdd"}
    return model.graph
