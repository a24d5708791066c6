"""A graph as an export writes it, over weights that are not there."""

from __future__ import annotations

import math
from pathlib import Path

import onnx

from lminf_export import op
from lminf_export.graph import save_graph
from lminf_export.models.base import AttentionPlan
from lminf_export.passes import optimize
from lminf_export.tracing import Trace
from lminf_export.weights import FILE_NAME, TYPE_NAMES, StoredTensor, attach, item_size


def export_without_weights(
    traced: Trace,
    plan: AttentionPlan,
    folder: Path,
    dtype: str = "float16",
    kv_cache_dtype: str | None = None,
) -> onnx.GraphProto:
    """Write a graph as an export does, checks and all, over a file of weights that is a hole."""
    optimize(traced.model)
    initializers, stored, offset = traced.model.graph.initializers, {}, 0
    for name in (name for name in traced.weight_names if name in initializers):
        shape = tuple(int(dim) for dim in initializers[name].shape.numpy())
        length = math.prod(shape) * item_size(dtype)
        stored[name] = StoredTensor(folder / FILE_NAME, TYPE_NAMES[dtype], shape, offset, length)
        offset += length
    with (folder / FILE_NAME).open("wb") as file:
        file.truncate(offset)
    attach(traced.model, stored)
    save_graph(
        traced, plan, dtype, folder / "model.onnx", metadata={}, kv_cache_dtype=kv_cache_dtype
    )
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    functions = {function.name for function in model.functions}
    attention = op.OP_TYPE if kv_cache_dtype is None else op.INT8_CACHE_OP_TYPE
    assert attention in functions
    assert functions <= {attention, "Linear", "LinearAdd"}
    return model.graph
