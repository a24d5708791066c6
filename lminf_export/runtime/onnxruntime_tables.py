"""The inputs and outputs of a graph in onnxruntime: checked by the manifest, or more of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lminf_export.bundle.records import Tensor
from lminf_export.bundle.tables import describe
from lminf_export.errors import SessionError
from lminf_export.tensors.dtypes import ELEMENT_TYPES

_NAMES = {row.onnxruntime: row.name for row in ELEMENT_TYPES.values()}
# Fields of onnx.proto: ModelProto.graph, GraphProto.output, ValueInfoProto.name.
_MODEL_GRAPH, _GRAPH_OUTPUT, _VALUE_NAME = 7, 12, 1


def require_table(path: Path, what: str, found: Sequence[Any], expected: Sequence[Tensor]) -> None:
    """Refuse a graph whose inputs or outputs are not the manifest's.

    Args:
        path: the graph's file.
        what: "inputs" or "outputs".
        found: onnxruntime's, in the graph's order.
        expected: the manifest's.

    Raises:
        SessionError: naming the first that differs.
    """
    table = [_as_tensor(x) for x in found]
    for index, row in enumerate(expected):
        other = table[index] if index < len(table) else None
        if other is None or not _same(other, row):
            raise SessionError(
                f"{path}: {what} {index} is {describe(other) if other else 'missing'}, the "
                f"manifest says {describe(row)}; export the model again"
            )
    if len(table) > len(expected):
        raise SessionError(
            f"{path}: {what} {len(expected)} is {describe(table[len(expected)])}, the manifest "
            "has none there; export the model again"
        )


def with_outputs(graph: bytes, names: Sequence[str]) -> bytes:
    """Return a serialised ONNX model with more of its values as outputs, behind its own.

    The outputs are appended as a second graph message. Parsers of protocol buffers merge two
    messages in the same field, and join repeated fields within them.

    Args:
        graph: the model.
        names: of values; onnxruntime infers their types.
    """
    outputs = (_message(_GRAPH_OUTPUT, _message(_VALUE_NAME, name.encode())) for name in names)
    return graph + _message(_MODEL_GRAPH, b"".join(outputs))


def _message(field: int, content: bytes) -> bytes:
    """Encode a length-delimited field of a protocol buffer; fields 1 … 15."""
    head, length = bytearray([field << 3 | 2]), len(content)
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*head, length]) + content


def _as_tensor(found: Any) -> Tensor:
    # An unnamed dimension is None.
    shape = tuple("?" if dim is None else dim for dim in found.shape)
    return Tensor(name=found.name, dtype=_NAMES.get(found.type, found.type), shape=shape)


def _same(found: Tensor, expected: Tensor) -> bool:
    """Equal up to the names of symbols, which a graph's optimiser may change."""
    numbers = tuple(x if isinstance(x, int) else None for x in found.shape)
    wanted = tuple(x if isinstance(x, int) else None for x in expected.shape)
    return (found.name, found.dtype, numbers) == (expected.name, expected.dtype, wanted)
