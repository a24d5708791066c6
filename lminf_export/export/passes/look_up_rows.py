"""Rows of a quantised table in standard operators, for what onnxruntime's own look-up lacks."""

from __future__ import annotations

import onnx_ir as ir

from lminf_export.export.passes import editing
from lminf_export.quantize.formats import BlockFormat


def dequantized_rows(
    form: BlockFormat,
    parts: tuple[ir.Value, ir.Value, ir.Value | None],
    ids: ir.Value,
    dtype: ir.DataType,
) -> list[ir.Node]:
    """Return the nodes that look rows up and dequantise them; the last one has the result.

    Args:
        form: of the table, symmetric.
        parts: the packed table (N, bytes of a row), its scales and its offsets (N, blocks), None
            for no offsets.
        ids: rows to look up, (B, S).
        dtype: of the result (B, S, columns and padding).
    """
    table, scales, offsets = parts
    nodes: list[ir.Node] = []

    def add(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nodes.append(ir.node(kind, list(inputs), attributes))
        return nodes[-1].outputs[0]

    def ints(*values: int) -> ir.Value:
        nodes.append(editing.ints(*values))
        return nodes[-1].outputs[0]

    def number(value: int, kind: ir.DataType) -> ir.Value:
        tensor = ir.tensor([value], dtype=kind)
        nodes.append(ir.node("Constant", [], {"value": tensor}))
        return nodes[-1].outputs[0]

    def of_blocks(values: ir.Value) -> ir.Value:
        taken = add("Cast", add("Gather", values, ids, axis=0), to=dtype.value)
        return add("Unsqueeze", taken, ints(-1))

    integers = add("Gather", table, ids, axis=0)
    if form.bits == 4:
        low = add("BitwiseAnd", integers, number(15, ir.DataType.UINT8))
        shifted = ir.node(
            "BitShift", [integers, number(4, ir.DataType.UINT8)], {"direction": "RIGHT"}
        )
        nodes.append(shifted)
        last = ints(-1)
        halves = [add("Unsqueeze", part, last) for part in (low, shifted.outputs[0])]
        integers = add("Concat", *halves, axis=-1)
    floats = add("Cast", integers, to=dtype.value)
    cut = add("Reshape", floats, ints(0, 0, form.blocks, form.block_size))
    centred = add("Sub", cut, number(1 << (form.bits - 1), dtype))
    rows = add("Mul", centred, of_blocks(scales))
    if offsets is not None:
        rows = add("Add", rows, of_blocks(offsets))
    add("Reshape", rows, ints(0, 0, form.blocks * form.block_size))
    return nodes
