"""A graph of bfloat16 as one of float32, to be run where no kernels take bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_LOW, _WIDE = TensorProto.BFLOAT16, TensorProto.FLOAT
_LOW_SUFFIX = ".bfloat16"


def in_float32(path: Path) -> bytes:
    """Return a graph's serialised form in which every tensor of bfloat16 is one of float32.

    Weights stay in their file; each is converted when the graph is run.

    Args:
        path: the graph's file.
    """
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != _LOW:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            name = tensor.name
            tensor.name += _LOW_SUFFIX
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=_WIDE))
        else:
            tensor.CopyFrom(_widened(tensor))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == _LOW:
            value.type.tensor_type.elem_type = _WIDE
    del graph.value_info[:]
    for nodes in (graph.node, *(function.node for function in model.functions)):
        _widen(nodes)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *rest])
    return bytes(model.SerializeToString())


def _widen(nodes: list[onnx.NodeProto]) -> None:
    """Change constants and conversions, in subgraphs too."""
    for node in nodes:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _LOW:
                attribute.i = _WIDE
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == _LOW:
                attribute.t.CopyFrom(_widened(attribute.t))
            if attribute.type == onnx.AttributeProto.GRAPH:
                del attribute.g.value_info[:]
                for value in (*attribute.g.input, *attribute.g.output):
                    if value.type.tensor_type.elem_type == _LOW:
                        value.type.tensor_type.elem_type = _WIDE
                _widen(attribute.g.node)


def _widened(tensor: TensorProto) -> TensorProto:
    content = numpy_helper.to_array(tensor).astype(np.float32)
    return numpy_helper.from_array(content, tensor.name)
