"""Quantised weights of a bundle, read back as the float32 values that they represent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lminf_export.errors import ModelError
from lminf_export.quantize.config import CHANNEL_DTYPES
from lminf_export.quantize.formats import BlockFormat, Blocks, as_unsigned, dequantize_rows
from lminf_export.quantize.names import OFFSETS, QUANTIZED, SCALES, ZERO_POINTS
from lminf_export.quantize.stored import BLOCK_ELEMENTS
from lminf_export.tensors.dtypes import safetensors_name
from lminf_export.tensors.stored import SourceTensor, StoredTensor


@dataclass(frozen=True)
class DequantizedWeight:
    """A stored quantised weight as float32 values: a `SourceTensor`.

    Attributes:
        form: how it is stored.
        signed: see `QuantizedWeight`.
        packed: where its integers are.
        scales: where its scales are.
        zero_points: where its zero points are; None where symmetric.
        offsets: where its offsets are; None for none.
    """

    form: BlockFormat
    signed: bool
    packed: StoredTensor
    scales: StoredTensor
    zero_points: StoredTensor | None
    offsets: StoredTensor | None = None

    @property
    def dtype(self) -> str:
        """safetensors' name of the element type."""
        return "F32"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return (self.form.rows, self.form.columns)

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors."""
        step = max(1, BLOCK_ELEMENTS // self.form.columns)
        for start in range(0, self.form.rows, step):
            rows = slice(start, start + step)
            packed = _rows(self.packed, rows).numpy()
            if self.signed:
                packed = as_unsigned(packed, self.form)
            zero_points = offsets = None
            if self.zero_points is not None:
                zero_points = _rows(self.zero_points, rows).numpy()
            if self.offsets is not None:
                offsets = _rows(self.offsets, rows).to(torch.float32).numpy()
            scales = _rows(self.scales, rows).to(torch.float32).numpy()
            dense = dequantize_rows(Blocks(packed, scales, zero_points, offsets), self.form)
            yield torch.from_numpy(np.ascontiguousarray(dense)).flatten()

    def at(self, index: int) -> SourceTensor:
        """Never called: only stacks are taken apart, and stacks are not quantised."""
        raise NotImplementedError


@dataclass(frozen=True)
class DequantizedChannels:
    """A stored weight with one scale for each row, as float32 values: a `SourceTensor`.

    Attributes:
        packed: where its rounded weights are, (N, K).
        scales: where its scales are, (N,).
    """

    packed: StoredTensor
    scales: StoredTensor

    @property
    def dtype(self) -> str:
        """safetensors' name of the element type."""
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K)."""
        return self.packed.shape

    @property
    def kind(self) -> str:
        """Return "int8" or "fp8"."""
        return next(
            k for k, x in CHANNEL_DTYPES.items() if safetensors_name(x) == self.packed.dtype
        )

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors."""
        step = max(1, BLOCK_ELEMENTS // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            scale = _rows(self.scales, rows).to(torch.float32)[:, None]
            yield (_rows(self.packed, rows).to(torch.float32) * scale).flatten()

    def at(self, index: int) -> SourceTensor:
        """Never called: only stacks are taken apart, and stacks are not quantised."""
        raise NotImplementedError


def _rows(tensor: StoredTensor, rows: slice) -> torch.Tensor:
    """Read some rows of a stored tensor."""
    start, stop, _ = rows.indices(tensor.shape[0])
    width = tensor.length // tensor.shape[0]
    part = StoredTensor(
        tensor.path,
        tensor.dtype,
        (stop - start, *tensor.shape[1:]),
        tensor.offset + start * width,
        (stop - start) * width,
    )
    return part.load()


def dequantize_stored(
    stored: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, tuple[int, int]],
    block_size: int,
    signed: bool,
) -> dict[str, SourceTensor]:
    """Return the tensors of a weights file under the model's names, quantised ones dequantised.

    Args:
        stored: tensors of the file, of `tensors.files.read_header`.
        shapes: the model's own shapes, by name.
        sizes: bits and block size of the weights in blocks, by name.
        block_size: that of weights that are not in `sizes`, whose bits follow from it.
        signed: see `QuantizedWeight`.

    Raises:
        ModelError: a quantised tensor belongs to no weight of the model.
    """
    found: dict[str, SourceTensor] = {}
    for name, tensor in stored.items():
        weight = name.removesuffix(QUANTIZED)
        if (
            name.endswith((SCALES, ZERO_POINTS, OFFSETS))
            and name.rpartition(".")[0] + QUANTIZED in stored
        ):
            continue
        if weight == name:
            found[name] = tensor
            continue
        if weight not in shapes:
            raise ModelError(f"quantised tensor {weight} belongs to no weight of this model")
        if tensor.dtype != "U8":
            found[weight] = DequantizedChannels(tensor, stored[weight + SCALES])
            continue
        rows, columns = shapes[weight]
        zero_points, offsets = stored.get(weight + ZERO_POINTS), stored.get(weight + OFFSETS)
        integers = columns if signed else block_size
        bits, size = sizes.get(weight, (tensor.shape[-1] * 8 // integers, block_size))
        form = BlockFormat(rows, columns, bits, size, zero_points is None, offsets is not None)
        _check_shapes(weight, form, tensor, stored[weight + SCALES], signed=signed)
        found[weight] = DequantizedWeight(
            form, signed, tensor, stored[weight + SCALES], zero_points, offsets
        )
    return found


def _check_shapes(
    name: str, form: BlockFormat, packed: StoredTensor, scales: StoredTensor, *, signed: bool
) -> None:
    wanted = (form.rows, form.columns // 2) if signed else form.packed_shape
    if packed.shape != wanted or scales.shape != form.scales_shape:
        raise ModelError(
            f"weight {name} has integers of shape {list(packed.shape)} and scales of "
            f"{list(scales.shape)}, expected {list(wanted)} and {list(form.scales_shape)}; export "
            f"the model again"
        )
