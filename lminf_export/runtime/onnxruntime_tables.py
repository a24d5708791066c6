"""Whether a graph that onnxruntime has loaded has the inputs and outputs of its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lminf_export.bundle.manifest import Tensor, describe
from lminf_export.errors import SessionError

_ORT_TYPES = {
    "tensor(int64)": "int64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int8)": "int8",
}


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


def _as_tensor(found: Any) -> Tensor:
    # An unnamed dimension is None.
    shape = tuple("?" if dim is None else dim for dim in found.shape)
    return Tensor(name=found.name, dtype=_ORT_TYPES.get(found.type, found.type), shape=shape)


def _same(found: Tensor, expected: Tensor) -> bool:
    """Equal up to the names of symbols, which a graph's optimiser may change."""
    numbers = tuple(x if isinstance(x, int) else None for x in found.shape)
    wanted = tuple(x if isinstance(x, int) else None for x in expected.shape)
    return (found.name, found.dtype, numbers) == (expected.name, expected.dtype, wanted)
