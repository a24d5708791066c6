"""The manifest's tables of inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence

from lminf_export.bundle.records import Tensor
from lminf_export.operator.bindings import TensorSpec
from lminf_export.operator.graph_contract import GraphContract


def io_tables(contract: GraphContract) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return a contract's inputs and outputs as the manifest writes them."""
    return (
        tuple(_row(spec) for spec in contract.inputs()),
        tuple(_row(spec) for spec in contract.outputs()),
    )


def first_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """Describe the first difference between a table and the one that the layers require."""
    for index, (left, right) in enumerate(zip(found, expected, strict=False)):
        if left != right:
            return f"entry {index} is {describe(left)}, the layers ask for {describe(right)}"
    return f"{len(found)} entries, the layers ask for {len(expected)}"


def describe(tensor: Tensor) -> str:
    """Return a tensor as text: name dtype[shape]."""
    return f"{tensor.name} {tensor.dtype}[{', '.join(map(str, tensor.shape))}]"


def _row(spec: TensorSpec) -> Tensor:
    return Tensor(name=spec.name, dtype=spec.dtype, shape=spec.shape)
