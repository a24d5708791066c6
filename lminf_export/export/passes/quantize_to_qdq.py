"""Projections read quantised weights through DequantizeLinear, as engines take them."""

from __future__ import annotations

from collections.abc import Sequence
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
from lminf_export.quantize.config import CHANNEL_DTYPES
from lminf_export.quantize.names import QUANTIZED, SCALES
from lminf_export.quantize.stored import ChannelWeight


@dataclass(frozen=True)
class QuantizeToQdqPass(ir.passes.InPlacePass):
    """Put a DequantizeLinear between each chosen weight and its products.

    TensorRT for RTX keeps INT4 with a scale for each block, and INT8 and fp8 with one for each
    row, as they are in its plans (`benchmarks/export/quantized_plans.py`).

    Requires: the graph reads the weights as they were chosen; they are of this form, and nothing
        looks rows up in them quantised.
    Ensures: no chosen reader reads a weight in full; a weight that nothing reads is gone.

    Attributes:
        choices: of `choose_weights`.
    """

    choices: Sequence[WeightChoice]

    def requires(self, model: ir.Model) -> None:
        check_chosen(model, self.choices, require)
        for choice in self.choices:
            is_signed = isinstance(choice.piece, ChannelWeight) or choice.piece.signed
            require(is_signed, f"{choice.name} is stored in blocks of MatMulNBits")
            require(not choice.lookups, f"rows of {choice.name} are looked up quantised")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for choice in self.choices:
            _dequantize_first(model.graph, choice)
            if choice.replaces_weight:
                model.graph.initializers.pop(choice.name)
        return ir.passes.PassResult(model, bool(self.choices))

    def ensures(self, model: ir.Model) -> None:
        check_replaced(model, self.choices, ensure)
        ensure_sound(model)


def _dequantize_first(graph: ir.Graph, choice: WeightChoice) -> None:
    piece, products = choice.piece, choice.products
    shape = piece.tensor.shape
    scales_shape: tuple[int, ...]
    if isinstance(piece, ChannelWeight):
        kind, attributes = onnx_dtype(CHANNEL_DTYPES[piece.kind]), {"axis": 0}
        scales_shape = shape[:1]
    else:
        kind, scales_shape = ir.DataType.INT4, piece.form.scales_shape
        attributes = {"axis": 1, "block_size": piece.form.block_size}
    dtype = onnx_dtype(piece.dtype)
    rounded = editing.declare_initializer(graph, piece.name + QUANTIZED, kind, shape)
    scales = editing.declare_initializer(graph, piece.name + SCALES, dtype, scales_shape)
    dense = ir.node("DequantizeLinear", [rounded, scales], attributes)
    dense.outputs[0].dtype = dtype
    dense.outputs[0].shape = ir.Shape(shape)
    graph.insert_before(products[0], dense)
    for node in products:
        node.replace_input_with(1, dense.outputs[0])
