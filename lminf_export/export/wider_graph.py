"""A graph of a narrow element type as one of float32."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_WIDE = TensorProto.FLOAT
_LOW_SUFFIX = ".low"


def widen(model: onnx.ModelProto, low: Collection[int]) -> None:
    """Make every tensor of some element types one of float32, in place.

    Args:
        model: the graph; weights in other files stay there, and are converted when it is run.
        low: the types, as TensorProto numbers them.
    """
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type not in low:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            name = tensor.name
            tensor.name += _LOW_SUFFIX
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=_WIDE))
        else:
            tensor.CopyFrom(_widened(tensor))
    _widen_ends(graph, low)
    del graph.value_info[:]
    for nodes in (graph.node, *(function.node for function in model.functions)):
        _widen_nodes(nodes, low)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *rest])


def _widen_ends(graph: onnx.GraphProto, low: Collection[int]) -> None:
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in low:
            value.type.tensor_type.elem_type = _WIDE


def _widen_nodes(nodes: Iterable[onnx.NodeProto], low: Collection[int]) -> None:
    """Change constants and conversions, in subgraphs too."""
    for node in nodes:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in low:
                attribute.i = _WIDE
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in low:
                attribute.t.CopyFrom(_widened(attribute.t))
            if attribute.type == onnx.AttributeProto.GRAPH:
                del attribute.g.value_info[:]
                for tensor in attribute.g.initializer:
                    if tensor.data_type in low:
                        tensor.CopyFrom(_widened(tensor))
                _widen_ends(attribute.g, low)
                _widen_nodes(attribute.g.node, low)


def _widened(tensor: TensorProto) -> TensorProto:
    content = numpy_helper.to_array(tensor).astype(np.float32)
    return numpy_helper.from_array(content, tensor.name)
