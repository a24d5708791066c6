"""Products in blocks of integers that take little memory where they run without packed weights.

onnxruntime then writes the whole weight out in float32 for every run: 1 GB for the head of a model
of 1 billion parameters, and most of the time of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import onnx
from onnx import TensorProto, helper

from lminf_export.operator.linear_bodies import CONTRIB_DOMAIN

_PRODUCT = "MatMulNBits"
# Bytes that one piece of a weight may take in float32.
_LARGEST = 2**26
_ELEMENT_BYTES = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2}


def without_products(graph: onnx.GraphProto) -> None:
    """Let products in blocks give zeros, in place: for runs that ask for shapes only."""
    _replace(graph, _zeros)


def in_pieces(graph: onnx.GraphProto) -> None:
    """Compute large products in blocks some rows of the weight after the other, in place.

    The operator and the bytes it reads are the same, and so are the results but for rounding.
    Weights that are not in files beside the graph stay whole.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    _replace(graph, lambda node: _pieces(graph, node, tensors))


def _replace(
    graph: onnx.GraphProto, change: Callable[[onnx.NodeProto], list[onnx.NodeProto] | None]
) -> None:
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        is_product = (node.domain, node.op_type) == (CONTRIB_DOMAIN, _PRODUCT)
        nodes += (change(node) if is_product else None) or [node]
    del graph.node[:]
    graph.node.extend(nodes)


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _zeros(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    x, result = node.input[0], node.output[0]
    sizes, width, shape = (f"{result}.{part}" for part in ("sizes", "width", "shape"))
    return [
        helper.make_node("Shape", [x], [sizes], start=0, end=-1),
        helper.make_node("Constant", [], [width], value_ints=[_integer(node, "N", 0)]),
        helper.make_node("Concat", [sizes, width], [shape], axis=0),
        helper.make_node("ConstantOfShape", [shape], [result]),
    ]


def _pieces(
    graph: onnx.GraphProto, node: onnx.NodeProto, tensors: dict[str, TensorProto]
) -> list[onnx.NodeProto] | None:
    """Return products of some rows each and their concatenation; None where one is enough."""
    rows = _integer(node, "N", 0)
    count = math.ceil(4 * rows * _integer(node, "K", 0) / _LARGEST)
    operands = list(node.input[1:])
    parts = [tensors.get(name) for name in operands if name]
    cut = all(_is_cut_by_rows(tensor, rows) for tensor in parts)
    if count < 2 or not cut:
        return None
    nodes, results = [], []
    for number, (first, last) in enumerate(_ranges(rows, count)):
        piece = onnx.NodeProto()
        piece.CopyFrom(node)
        piece.output[0] = f"{node.output[0]}.{number}"
        piece.name = piece.output[0]
        for attribute in piece.attribute:
            if attribute.name == "N":
                attribute.i = last - first
        for place, name in enumerate(operands, 1):
            if name:
                piece.input[place] = f"{name}.{number}"
                graph.initializer.append(_rows(tensors[name], piece.input[place], first, last))
        results.append(piece.output[0])
        nodes.append(piece)
    return [*nodes, helper.make_node("Concat", results, [node.output[0]], axis=-1)]


def _ranges(rows: int, count: int) -> Iterator[tuple[int, int]]:
    edges = [rows * number // count for number in range(count + 1)]
    return pairwise(edges)


def _is_cut_by_rows(tensor: TensorProto | None, rows: int) -> bool:
    """Say whether a tensor lies in a file, one row of the weight after the other."""
    return (
        tensor is not None
        and tensor.data_location == TensorProto.EXTERNAL
        and len(tensor.dims) > 0
        and tensor.dims[0] == rows
        and (tensor.data_type == TensorProto.UINT8 or tensor.data_type in _ELEMENT_BYTES)
    )


def _rows(tensor: TensorProto, name: str, first: int, last: int) -> TensorProto:
    """Return rows of a tensor in a file."""
    found = TensorProto()
    found.CopyFrom(tensor)
    found.name, found.dims[0] = name, last - first
    row = math.prod(tensor.dims[1:]) * _ELEMENT_BYTES.get(tensor.data_type, 1)
    where = {entry.key: entry.value for entry in tensor.external_data}
    where |= {
        "offset": str(int(where.get("offset", "0")) + first * row),
        "length": str((last - first) * row),
    }
    del found.external_data[:]
    for key, value in where.items():
        found.external_data.add(key=key, value=value)
    return found
