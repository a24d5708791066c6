"""Quantised weights as they are stored in a bundle: names, types, and writing row by row.

A weight `x.weight` (N, K) becomes tensors `x.weight.quantized`, `x.weight.scales` and, where it
is asymmetric, `x.weight.zero_points`, one behind the other. Rows go through memory a few at a
time, so a lm_head of 128,000 rows costs no more than any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lminf_export.errors import ModelError
from lminf_export.quantize.config import CHANNEL_DTYPES
from lminf_export.quantize.formats import (
    BlockFormat,
    as_signed,
    quantize_rows,
)
from lminf_export.tensors.dtypes import safetensors_name
from lminf_export.tensors.pieces import Entry, all_finite
from lminf_export.tensors.stored import SourceTensor
from lminf_export.tensors.torch_dtypes import torch_dtype

FILE_NAME = "weights.safetensors"
QUANTIZED, SCALES, ZERO_POINTS = ".quantized", ".scales", ".zero_points"
# Elements quantised in one go: 32 MB of float32, which the quantiser wants transposed as well.
BLOCK_ELEMENTS = 2**23


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight to be quantised: a `Piece` of `tensors.writing.write_pieces`.

    Attributes:
        name: the weight's own name.
        tensor: the source, (N, K).
        form: how it is stored.
        dtype: element type of the scales.
        signed: two's complement without padding, as ONNX's INT4, instead of the blocks of
            MatMulNBits.
    """

    name: str
    tensor: SourceTensor
    form: BlockFormat
    dtype: str
    signed: bool

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Packed integers, scales and perhaps zero points."""
        form = self.form
        shape: tuple[int, ...] = form.packed_shape
        if self.signed:
            shape = (form.rows, form.columns // 2)
        entries = [
            Entry(self.name + QUANTIZED, "U8", shape),
            Entry(self.name + SCALES, safetensors_name(self.dtype), form.scales_shape),
        ]
        if not form.symmetric:
            entries.append(Entry(self.name + ZERO_POINTS, "U8", form.zero_points_shape))
        return tuple(entries)

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the packed rows as they are quantised, then scales and zero points.

        Raises:
            ModelError: a weight is not finite, or a scale does not fit into the element type.
        """
        scales, zero_points = [], []
        for rows in row_blocks(self.tensor, max(1, BLOCK_ELEMENTS // self.form.columns)):
            if not all_finite(rows):
                raise ModelError(f"tensor {self.name} holds values that are not finite")
            blocks = quantize_rows(rows, self.form)
            yield as_signed(blocks.packed, self.form) if self.signed else blocks.packed
            scales.append(self._in_dtype(blocks.scales))
            if blocks.zero_points is not None:
                zero_points.append(blocks.zero_points)
        for part in (*scales, *zero_points):
            yield part.view(np.uint8)

    def _in_dtype(self, scales: NDArray[np.float32]) -> NDArray[np.uint8]:
        converted = torch.from_numpy(scales).to(torch_dtype(self.dtype))
        if not all_finite(converted):
            raise ModelError(
                f"tensor {self.name} has values beyond {self.dtype}'s range; export with "
                f"--dtype float32"
            )
        return converted.view(torch.uint8).numpy()


@dataclass(frozen=True)
class ChannelWeight:
    """One weight with a single scale for each row, which is how TensorRT takes 8-bit weights.

    Attributes:
        name: the weight's own name.
        tensor: the source, (N, K).
        kind: "int8" or "fp8" (E4M3).
        dtype: element type of the scales.
    """

    name: str
    tensor: SourceTensor
    kind: str
    dtype: str

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The rounded weights and their scales."""
        return (
            Entry(
                self.name + QUANTIZED,
                safetensors_name(CHANNEL_DTYPES[self.kind]),
                self.tensor.shape,
            ),
            Entry(self.name + SCALES, safetensors_name(self.dtype), (self.tensor.shape[0],)),
        )

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the rows as they are rounded, then the scales.

        Raises:
            ModelError: a weight is not finite.
        """
        scales = []
        for rows in row_blocks(self.tensor, max(1, BLOCK_ELEMENTS // self.tensor.shape[1])):
            if not all_finite(rows):
                raise ModelError(f"tensor {self.name} holds values that are not finite")
            rounded, scale = quantize_channels(rows, self.kind, torch_dtype(self.dtype))
            yield rounded.view(torch.uint8).numpy()
            scales.append(scale.view(torch.uint8).numpy())
        yield from scales


_LARGEST = {"int8": 127.0, "fp8": 448.0}


def quantize_channels(
    rows: torch.Tensor, kind: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows (R, K) float32 to int8 or fp8; return them and positive scales (R,) of a dtype."""
    largest = _LARGEST[kind]
    scale = (rows.abs().amax(1) / largest).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    scaled = (rows / scale.to(torch.float32)[:, None]).clamp(-largest, largest)
    if kind == "fp8":
        return scaled.to(torch.float8_e4m3fn), scale
    return scaled.round().to(torch.int8), scale


def row_blocks(tensor: SourceTensor, count: int) -> Iterator[torch.Tensor]:
    """Yield the rows of a tensor (N, K), up to `count` at a time, as float32 (R, K)."""
    columns = tensor.shape[1]
    waiting: list[torch.Tensor] = []
    size = 0
    for block in tensor.blocks():
        for part in block.split(count * columns):
            waiting.append(part)
            size += len(part)
            if size < count * columns:
                continue
            flat = torch.cat(waiting)
            ready, rest = flat[: count * columns], flat[count * columns :]
            yield ready.to(torch.float32).reshape(-1, columns)
            waiting, size = [rest], len(rest)
    if size:
        yield torch.cat(waiting).to(torch.float32).reshape(-1, columns)
