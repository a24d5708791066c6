"""Element types as ONNX's objects; the table is `tensors.dtypes`."""

from __future__ import annotations

import onnx_ir as ir

from lminf_export.tensors.dtypes import ELEMENT_TYPES

_NAMES = {row.onnx: row.name for row in ELEMENT_TYPES.values()}


def onnx_dtype(name: str) -> ir.DataType:
    """Return ONNX's type of an element type, by our name."""
    return ir.DataType[ELEMENT_TYPES[name].onnx]


def dtype_name(dtype: ir.DataType) -> str:
    """Return our name of ONNX's type, or ONNX's own where the table has no such type."""
    return _NAMES.get(dtype.name, dtype.name)
