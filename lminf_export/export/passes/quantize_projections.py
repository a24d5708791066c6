"""The graph's projections and embedding table on quantised weights.

Works on what `passes.optimize` leaves: every projection is a Gemm with transB on an initializer
without data. That holds for fused projections as well, whose weight is one initializer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from lminf_export.export.onnx_dtypes import onnx_dtype
from lminf_export.models.expert_facts import is_router_weight
from lminf_export.operator.linear_bodies import CONTRIB_DOMAIN
from lminf_export.quantize.config import BITS, CHANNEL_DTYPES, QuantizeConfig
from lminf_export.quantize.formats import BlockFormat
from lminf_export.quantize.stored import (
    QUANTIZED,
    SCALES,
    ZERO_POINTS,
    ChannelWeight,
    QuantizedWeight,
)
from lminf_export.tensors.stored import SourceTensor, StoredTensor

Quantized: TypeAlias = QuantizedWeight | ChannelWeight


@dataclass(frozen=True)
class Choice:
    """A weight that is to be quantised.

    Attributes:
        products: the Gemm nodes that multiply by it.
        lookups: the Gather nodes that look rows up in it and are to read it quantised.
        kind: "int4", "int8" or "fp8".
        stored_as: its name in the file; another than the initializer's, a tied one, where the
            initializer stays because somebody reads it in full.
    """

    products: tuple[ir.Node, ...]
    lookups: tuple[ir.Node, ...]
    kind: str
    stored_as: str


def choose_weights(
    model: ir.Model, names: Mapping[str, Sequence[str]], config: QuantizeConfig
) -> dict[str, Choice]:
    """Return which of a model's weights to quantise: the matrices that tokens meet.

    Args:
        model: the graph.
        names: initializer name → every name the model has for this weight.
        config: what the user asked for.
    """
    vocab_size = model.graph.outputs[0].shape[2]  # type: ignore[index]
    choices = {}
    for name, aliases in names.items():
        value = model.graph.initializers[name]
        if value.shape is None or len(value.shape) != 2:
            continue
        products = tuple(use.node for use in value.uses() if _is_product(*use))
        lookups = tuple(use.node for use in value.uses() if _is_lookup(*use))
        others = len(value.uses()) - len(products) - len(lookups)
        rows, columns = value.shape.numpy()
        is_head = bool(products) and rows == vocab_size
        kind = config.lm_head_kind if is_head else config.weights
        # The choice of experts depends on small differences, and routers are small.
        if kind is None or is_router_weight(name):
            continue
        if config.form == "qdq" and kind == "int4" and columns % 2:
            continue  # two share a byte, and rows begin with one
        wanted = {"auto": bool(products), "quantized": True, "full": False}[config.embeddings]
        taken = lookups if wanted and config.form != "qdq" else ()
        stays = others > 0 or taken != lookups
        spare = [alias for alias in aliases if alias != name] if stays else [name]
        if spare and (products or taken):
            choices[name] = Choice(products, taken, kind, spare[0])
    return choices


def quantize_graph(
    model: ir.Model,
    choices: Mapping[str, Choice],
    sources: Mapping[str, SourceTensor],
    config: QuantizeConfig,
    dtype: str,
) -> list[Quantized]:
    """Let the chosen weights' readers read them quantised.

    Args:
        model: changed in place.
        choices: of `choose_weights`.
        sources: the tensors to quantise, by initializer name.
        config: how.
        dtype: element type of activations and scales.

    Returns:
        What is to be written; `attach_quantized` then points the graph there.
    """
    graph = model.graph
    pieces = []
    for name, choice in choices.items():
        piece = _piece(choice, sources[name], config, dtype)
        pieces.append(piece)
        if isinstance(piece, ChannelWeight) or piece.signed:
            _dequantize_first(graph, piece, choice.products)
        else:
            _multiply_blocks(graph, piece, choice.products, config.accuracy_level)
            _look_up_blocks(graph, piece, choice.lookups)
        if choice.stored_as == name:
            graph.initializers.pop(name)
    if pieces and config.form == "matmul_nbits":
        model.opset_imports[CONTRIB_DOMAIN] = 1
    return pieces


def _piece(choice: Choice, tensor: SourceTensor, config: QuantizeConfig, dtype: str) -> Quantized:
    """Describe how a weight is stored: as blocks, or with one scale a row where engines want it."""
    if config.form == "qdq" and choice.kind != "int4":
        return ChannelWeight(choice.stored_as, tensor, choice.kind, dtype)
    rows, columns = tensor.shape
    bits = BITS[choice.kind]
    form = BlockFormat(rows, columns, bits, config.block_size, config.symmetric)
    return QuantizedWeight(choice.stored_as, tensor, form, dtype, signed=config.form == "qdq")


def attach_quantized(
    model: ir.Model, pieces: Sequence[Quantized], stored: Mapping[str, StoredTensor]
) -> None:
    """Point the initializers of quantised weights into the weights file."""
    for value in (v for piece in pieces for v in _values(model.graph, piece)):
        assert value.name is not None
        assert value.shape is not None
        assert value.dtype is not None
        tensor = stored[value.name.removesuffix(_TABLE)]
        value.const_value = ir.ExternalTensor(
            Path(tensor.path).name,
            tensor.offset,
            tensor.length,
            value.dtype,
            shape=value.shape,
            name=value.name,
            base_dir=tensor.path.parent,
        )


# The same bytes with the two dimensions of a table instead of the three of blocks.
_TABLE = ".table"


def _values(graph: ir.Graph, piece: Quantized) -> list[ir.Value]:
    names = [piece.name + part for part in (QUANTIZED, QUANTIZED + _TABLE, SCALES, ZERO_POINTS)]
    return [graph.initializers[name] for name in names if name in graph.initializers]


def _multiply_blocks(
    graph: ir.Graph, piece: QuantizedWeight, products: Sequence[ir.Node], accuracy_level: int
) -> None:
    """Replace Gemm by MatMulNBits."""
    form = piece.form
    for node in products:
        packed = _initializer(graph, piece.name + QUANTIZED, ir.DataType.UINT8, form.packed_shape)
        scales, zero_points = _scales(graph, piece), _zero_points(graph, piece)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        inputs = [node.inputs[0], packed, scales, zero_points, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        attributes = {
            "K": form.columns,
            "N": form.rows,
            "bits": form.bits,
            "block_size": form.block_size,
            "accuracy_level": accuracy_level,
        }
        product = ir.node("MatMulNBits", inputs, attributes, domain=CONTRIB_DOMAIN)
        _replace(graph, node, [product])


def _dequantize_first(graph: ir.Graph, piece: Quantized, products: Sequence[ir.Node]) -> None:
    """Put a DequantizeLinear between the weight and its products.

    TensorRT for RTX keeps INT4 with a scale for each block, and INT8 and fp8 with one for each
    row, as they are in its plans (`benchmarks/export/quantized_plans.py`).
    """
    if not products:
        return
    shape = piece.tensor.shape
    if isinstance(piece, ChannelWeight):
        kind, attributes, scales_shape = (
            onnx_dtype(CHANNEL_DTYPES[piece.kind]),
            {"axis": 0},
            shape[:1],
        )
    else:
        kind, scales_shape = ir.DataType.INT4, piece.form.scales_shape
        attributes = {"axis": 1, "block_size": piece.form.block_size}
    rounded = _initializer(graph, piece.name + QUANTIZED, kind, shape)
    scales = _initializer(graph, piece.name + SCALES, onnx_dtype(piece.dtype), scales_shape)
    dense = ir.node("DequantizeLinear", [rounded, scales], attributes)
    dense.outputs[0].dtype = onnx_dtype(piece.dtype)
    dense.outputs[0].shape = ir.Shape(shape)
    graph.insert_before(products[0], dense)
    for node in products:
        node.replace_input_with(1, dense.outputs[0])


def _look_up_blocks(graph: ir.Graph, piece: QuantizedWeight, lookups: Sequence[ir.Node]) -> None:
    """Replace the embedding's Gather by one that dequantises the rows it takes."""
    form = piece.form
    width = form.blocks * form.block_size * form.bits // 8
    for node in lookups:
        name = piece.name + QUANTIZED + _TABLE
        table = _initializer(graph, name, ir.DataType.UINT8, (form.rows, width))
        inputs = [table, node.inputs[1], _scales(graph, piece), _zero_points(graph, piece)]
        attributes = {
            "bits": form.bits,
            "block_size": form.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        if inputs[-1] is None:
            inputs.pop()
        found = ir.node("GatherBlockQuantized", inputs, attributes, domain=CONTRIB_DOMAIN)
        nodes = [found]
        if form.blocks * form.block_size != form.columns:  # padding of the last block
            ends = [_ints(0), _ints(form.columns), _ints(-1)]
            cut = ir.node("Slice", [found.outputs[0], *(end.outputs[0] for end in ends)])
            nodes += [*ends, cut]
        _replace(graph, node, nodes)


def _scales(graph: ir.Graph, piece: QuantizedWeight) -> ir.Value:
    name, shape = piece.name + SCALES, piece.form.scales_shape
    return _initializer(graph, name, onnx_dtype(piece.dtype), shape)


def _zero_points(graph: ir.Graph, piece: QuantizedWeight) -> ir.Value | None:
    if piece.form.symmetric:
        return None
    name, shape = piece.name + ZERO_POINTS, piece.form.zero_points_shape
    return _initializer(graph, name, ir.DataType.UINT8, shape)


def _initializer(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...]
) -> ir.Value:
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape)
        )
    return graph.initializers[name]


def _replace(graph: ir.Graph, old: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put nodes in another's place; the last one's output takes over its name and users."""
    before, after = old.outputs[0], new[-1].outputs[0]
    after.shape, after.type, after.name = before.shape, before.type, before.name
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def _ints(*values: int) -> ir.Node:
    return ir.node("Constant", [], {"value": ir.tensor(np.array(values, dtype=np.int64))})


def _is_product(node: ir.Node, place: int) -> bool:
    return node.op_type == "Gemm" and not node.domain and place == 1 and _is_transposed(node)


def _is_transposed(node: ir.Node) -> bool:
    attribute = node.attributes.get("transB")
    return attribute is not None and attribute.as_int() == 1


def _is_lookup(node: ir.Node, place: int) -> bool:
    return node.op_type == "Gather" and not node.domain and place == 0
