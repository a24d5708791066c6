"""Projections and the embedding read weights in blocks: MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from lminf_export.export.onnx_dtypes import onnx_dtype
from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, ensure_sound, require
from lminf_export.export.passes.choose_weights import (
    WeightChoice,
    check_chosen,
    check_replaced,
)
from lminf_export.export.passes.look_up_rows import TableParts, dequantized_rows
from lminf_export.operator.linear_bodies import CONTRIB_DOMAIN
from lminf_export.quantize.names import OFFSETS, QUANTIZED, SCALES, ZERO_POINTS
from lminf_export.quantize.stored import QuantizedWeight
from lminf_export.tensors.stored import StoredTensor

# The same bytes with the two dimensions of a table instead of the three of blocks.
_TABLE = ".table"
# x and the size of a block → the sums of x's blocks, which all products of x share.
_Sums: TypeAlias = dict[tuple[ir.Value, int], ir.Value]


@dataclass(frozen=True)
class QuantizeToBlocksPass(ir.passes.InPlacePass):
    """Let the chosen weights' readers read them in blocks, as onnxruntime does.

    A Gemm becomes MatMulNBits, a Gather GatherBlockQuantized, or standard operators where blocks
    have offsets, or scales of float16 beside float32. Offsets meet the sums of a token's blocks in
    a Gemm of their own, which the product adds. The parts of a weight are initializers without
    data; `stored_initializers` says where their bytes are.

    onnxruntime's MatMulNBits itself takes no scales of another type than x: the operators that
    `FuseLinearOperatorsPass` makes of it do.

    Requires: the graph reads the weights as they were chosen; they are of this form.
    Ensures: no chosen reader reads a weight in full; a weight that nothing reads is gone.

    Attributes:
        choices: of `choose_weights`.
        accuracy_level: type of MatMulNBits' products, 4 for int8.
    """

    choices: Sequence[WeightChoice]
    accuracy_level: int

    def requires(self, model: ir.Model) -> None:
        check_chosen(model, self.choices, require)
        for choice in self.choices:
            is_blocks = isinstance(choice.piece, QuantizedWeight) and not choice.piece.signed
            require(is_blocks, f"{choice.name} is not stored in blocks of MatMulNBits")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        sums: _Sums = {}
        for choice in self.choices:
            assert isinstance(choice.piece, QuantizedWeight)
            for node in choice.products:
                _multiply_blocks(graph, choice.piece, node, self.accuracy_level, sums)
            for node in choice.lookups:
                dtype = model.graph.initializers[choice.name].dtype
                assert dtype is not None
                _look_up_blocks(graph, choice.piece, node, dtype)
            if choice.replaces_weight:
                graph.initializers.pop(choice.name)
        if self.choices:
            model.opset_imports[CONTRIB_DOMAIN] = 1
        return ir.passes.PassResult(model, bool(self.choices))

    def ensures(self, model: ir.Model) -> None:
        check_replaced(model, self.choices, ensure)
        ensure_sound(model)


def stored_initializers(
    model: ir.Model, pieces: Iterable[str], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return where the bytes are of every initializer that is part of a quantised weight.

    Args:
        model: the graph after its weights were quantised.
        pieces: names under which the weights are stored.
        stored: what was written, by name.
    """
    names = [
        name + part
        for name in pieces
        for part in (QUANTIZED, QUANTIZED + _TABLE, SCALES, ZERO_POINTS, OFFSETS)
    ]
    names = [name for name in names if name in model.graph.initializers]
    return {name: stored[name.removesuffix(_TABLE)] for name in names}


def _multiply_blocks(
    graph: ir.Graph, piece: QuantizedWeight, gemm: ir.Node, accuracy_level: int, sums: _Sums
) -> None:
    form = piece.form
    packed = editing.declare_initializer(
        graph, piece.name + QUANTIZED, ir.DataType.UINT8, form.packed_shape
    )
    scales, zero_points = _scales(graph, piece), _zero_points(graph, piece)
    x, bias = gemm.inputs[0], gemm.inputs[2] if len(gemm.inputs) > 2 else None
    inputs = [x, packed, scales, zero_points, None, bias]
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
    if not form.offsets:
        editing.replace(graph, gemm, [product])
        return
    assert x is not None
    new, block_sums = _block_sums(x, piece, sums)
    weight = _offsets(graph, piece)
    level = ir.node("Gemm", [block_sums, weight], {"transB": 1})
    whole = ir.node("Add", [product.outputs[0], level.outputs[0]])
    editing.replace(graph, gemm, [*new, level, product, whole])


def _block_sums(x: ir.Value, piece: QuantizedWeight, sums: _Sums) -> tuple[list[ir.Node], ir.Value]:
    """Return the sums (M, blocks) of x's blocks, and the nodes that make them if none did."""
    form = piece.form
    key = (x, form.block_size)
    if key in sums:
        return [], sums[key]
    shape = editing.ints(-1, form.blocks, form.block_size)
    cut = ir.node("Reshape", [x, shape.outputs[0]])
    axis = editing.ints(2)
    total = ir.node("ReduceSum", [cut.outputs[0], axis.outputs[0]], {"keepdims": 0})
    sums[key] = total.outputs[0]
    return [shape, cut, axis, total], total.outputs[0]


def _look_up_blocks(
    graph: ir.Graph, piece: QuantizedWeight, gather: ir.Node, dtype: ir.DataType
) -> None:
    """Replace the embedding's Gather by nodes that dequantise the rows it takes."""
    form = piece.form
    width = form.blocks * form.block_size * form.bits // 8
    name = piece.name + QUANTIZED + _TABLE
    table = editing.declare_initializer(graph, name, ir.DataType.UINT8, (form.rows, width))
    scales = _scales(graph, piece)
    if form.offsets or scales.dtype != dtype:
        offsets = _offsets(graph, piece) if form.offsets else None
        ids = gather.inputs[1]
        assert ids is not None
        parts = TableParts(table, scales, _zero_points(graph, piece), offsets)
        nodes = dequantized_rows(form, parts, ids, dtype)
    else:
        nodes = [_contrib_look_up(graph, piece, table, gather.inputs[1])]
    if form.blocks * form.block_size != form.columns:  # padding of the last block
        ends = [editing.ints(0), editing.ints(form.columns), editing.ints(-1)]
        cut = ir.node("Slice", [nodes[-1].outputs[0], *(end.outputs[0] for end in ends)])
        nodes += [*ends, cut]
    editing.replace(graph, gather, nodes)


def _contrib_look_up(
    graph: ir.Graph, piece: QuantizedWeight, table: ir.Value, ids: ir.Value | None
) -> ir.Node:
    """Return onnxruntime's own node, whose rows have the scales' type."""
    inputs = [table, ids, _scales(graph, piece), _zero_points(graph, piece)]
    attributes = {
        "bits": piece.form.bits,
        "block_size": piece.form.block_size,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    if inputs[-1] is None:
        inputs.pop()
    return ir.node("GatherBlockQuantized", inputs, attributes, domain=CONTRIB_DOMAIN)


def _offsets(graph: ir.Graph, piece: QuantizedWeight) -> ir.Value:
    name, shape = piece.name + OFFSETS, piece.form.scales_shape
    return editing.declare_initializer(graph, name, onnx_dtype(piece.offset_dtype), shape)


def _scales(graph: ir.Graph, piece: QuantizedWeight) -> ir.Value:
    name, shape = piece.name + SCALES, piece.form.scales_shape
    return editing.declare_initializer(graph, name, onnx_dtype(piece.dtype), shape)


def _zero_points(graph: ir.Graph, piece: QuantizedWeight) -> ir.Value | None:
    if piece.form.symmetric:
        return None
    name, shape = piece.name + ZERO_POINTS, piece.form.zero_points_shape
    return editing.declare_initializer(graph, name, ir.DataType.UINT8, shape)
