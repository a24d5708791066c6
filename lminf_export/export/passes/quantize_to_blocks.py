"""Projections and the embedding read weights in blocks: MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.export.onnx_dtypes import onnx_dtype
from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, ensure_sound, require
from lminf_export.export.passes.choose_weights import (
    WeightChoice,
    check_chosen,
    check_replaced,
)
from lminf_export.operator.linear_bodies import CONTRIB_DOMAIN
from lminf_export.quantize.stored import QUANTIZED, SCALES, ZERO_POINTS, QuantizedWeight
from lminf_export.tensors.stored import StoredTensor

# The same bytes with the two dimensions of a table instead of the three of blocks.
_TABLE = ".table"


@dataclass(frozen=True)
class QuantizeToBlocksPass(ir.passes.InPlacePass):
    """Let the chosen weights' readers read them in blocks, as onnxruntime does.

    A Gemm becomes MatMulNBits, a Gather GatherBlockQuantized. The parts of a weight are
    initializers without data; `stored_initializers` says where their bytes are.

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
        for choice in self.choices:
            assert isinstance(choice.piece, QuantizedWeight)
            for node in choice.products:
                _multiply_blocks(graph, choice.piece, node, self.accuracy_level)
            for node in choice.lookups:
                _look_up_blocks(graph, choice.piece, node)
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
        for part in (QUANTIZED, QUANTIZED + _TABLE, SCALES, ZERO_POINTS)
    ]
    names = [name for name in names if name in model.graph.initializers]
    return {name: stored[name.removesuffix(_TABLE)] for name in names}


def _multiply_blocks(
    graph: ir.Graph, piece: QuantizedWeight, gemm: ir.Node, accuracy_level: int
) -> None:
    form = piece.form
    packed = editing.declare_initializer(
        graph, piece.name + QUANTIZED, ir.DataType.UINT8, form.packed_shape
    )
    scales, zero_points = _scales(graph, piece), _zero_points(graph, piece)
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    inputs = [gemm.inputs[0], packed, scales, zero_points, None, bias]
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
    editing.replace(graph, gemm, [product])


def _look_up_blocks(graph: ir.Graph, piece: QuantizedWeight, gather: ir.Node) -> None:
    """Replace the embedding's Gather by one that dequantises the rows it takes."""
    form = piece.form
    width = form.blocks * form.block_size * form.bits // 8
    name = piece.name + QUANTIZED + _TABLE
    table = editing.declare_initializer(graph, name, ir.DataType.UINT8, (form.rows, width))
    inputs = [table, gather.inputs[1], _scales(graph, piece), _zero_points(graph, piece)]
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
        ends = [editing.ints(0), editing.ints(form.columns), editing.ints(-1)]
        cut = ir.node("Slice", [found.outputs[0], *(end.outputs[0] for end in ends)])
        nodes += [*ends, cut]
    editing.replace(graph, gather, nodes)


def _scales(graph: ir.Graph, piece: QuantizedWeight) -> ir.Value:
    name, shape = piece.name + SCALES, piece.form.scales_shape
    return editing.declare_initializer(graph, name, onnx_dtype(piece.dtype), shape)


def _zero_points(graph: ir.Graph, piece: QuantizedWeight) -> ir.Value | None:
    if piece.form.symmetric:
        return None
    name, shape = piece.name + ZERO_POINTS, piece.form.zero_points_shape
    return editing.declare_initializer(graph, name, ir.DataType.UINT8, shape)
