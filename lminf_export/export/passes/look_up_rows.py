"""Rows of a quantised table in standard operators, for what onnxruntime's own look-up lacks."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from lminf_export.export.passes import editing
from lminf_export.quantize.formats import BlockFormat


@dataclass(frozen=True)
class TableParts:
    """A quantised table of N rows.

    Attributes:
        packed: (N, bytes of a row).
        scales: (N, blocks).
        zero_points: (N, bytes); None where symmetric.
        offsets: (N, blocks); None for none.
    """

    packed: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    offsets: ir.Value | None


def dequantized_rows(
    form: BlockFormat, table: TableParts, ids: ir.Value, dtype: ir.DataType
) -> list[ir.Node]:
    """Return the nodes that look rows up and dequantise them; the last one has the result.

    Args:
        form: of the table.
        table: its parts.
        ids: rows to look up, (B, S).
        dtype: of the result (B, S, columns and padding).
    """
    new = _Nodes(ids, dtype)
    integers = new.reshaped(new.integers(table.packed, form.bits), form.blocks, form.block_size)
    if table.zero_points is None:
        zero = new.number(1 << (form.bits - 1), dtype)
    else:
        zeros = new.integers(table.zero_points, form.bits)
        ends = [new.ints(0), new.ints(form.blocks), new.ints(-1)]
        zero = new.add("Unsqueeze", new.add("Slice", zeros, *ends), new.ints(-1))
    rows = new.add("Mul", new.add("Sub", integers, zero), new.of_blocks(table.scales))
    if table.offsets is not None:
        rows = new.add("Add", rows, new.of_blocks(table.offsets))
    new.reshaped(rows, form.blocks * form.block_size)
    return new.nodes


@dataclass
class _Nodes:
    """New nodes in order, and what makes them.

    Attributes:
        ids: rows to look up.
        dtype: of all floats.
        nodes: those made so far.
    """

    ids: ir.Value
    dtype: ir.DataType
    nodes: list[ir.Node] = field(default_factory=list)

    def add(self, kind: str, *inputs: ir.Value, **attributes: int | str) -> ir.Value:
        """Append a node, and return its output."""
        return self._append(ir.node(kind, list(inputs), attributes))

    def ints(self, *values: int) -> ir.Value:
        """Append a Constant of int64."""
        return self._append(editing.ints(*values))

    def number(self, value: int, kind: ir.DataType) -> ir.Value:
        """Append a Constant of shape (1,)."""
        tensor = ir.tensor([value], dtype=kind)
        return self._append(ir.node("Constant", [], {"value": tensor}))

    def integers(self, packed: ir.Value, bits: int) -> ir.Value:
        """Look rows of packed integers up: floats (B, S, count)."""
        found = self.add("Gather", packed, self.ids, axis=0)
        if bits == 4:
            low = self.add("BitwiseAnd", found, self.number(15, ir.DataType.UINT8))
            four = self.number(4, ir.DataType.UINT8)
            high = self.add("BitShift", found, four, direction="RIGHT")
            halves = [self.add("Unsqueeze", part, self.ints(-1)) for part in (low, high)]
            found = self.reshaped(self.add("Concat", *halves, axis=-1), -1)
        return self.add("Cast", found, to=self.dtype.value)

    def of_blocks(self, values: ir.Value) -> ir.Value:
        """Look up one number for each block: (B, S, blocks, 1)."""
        taken = self.add("Gather", values, self.ids, axis=0)
        return self.add("Unsqueeze", self.add("Cast", taken, to=self.dtype.value), self.ints(-1))

    def reshaped(self, values: ir.Value, *sizes: int) -> ir.Value:
        """Give all dimensions behind (B, S) other sizes."""
        return self.add("Reshape", values, self.ints(0, 0, *sizes))

    def _append(self, node: ir.Node) -> ir.Value:
        self.nodes.append(node)
        return node.outputs[0]
