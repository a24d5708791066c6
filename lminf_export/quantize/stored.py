"""Quantised weights as they are stored in a bundle: names, types, and writing row by row.

A weight `x.weight` (N, K) becomes tensors `x.weight.quantized`, `x.weight.scales` and, where it
has them, `x.weight.zero_points` and `x.weight.offsets`, one behind the other. Rows go through
memory a few at a time, so a lm_head of 128,000 rows costs no more than any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lminf_export.errors import ModelError
from lminf_export.quantize.config import CHANNEL_DTYPES
from lminf_export.quantize.formats import BlockFormat, Blocks, as_signed, quantize_rows
from lminf_export.quantize.kept import KeptType, kept_rows
from lminf_export.quantize.names import OFFSETS, QUANTIZED, SCALES, ZERO_POINTS
from lminf_export.quantize.search import rounded_rows, searched_rows
from lminf_export.quantize.spool import SpooledBlocks
from lminf_export.tensors.dtypes import safetensors_name
from lminf_export.tensors.gguf_blocks import GgufTensor
from lminf_export.tensors.pieces import Entry, all_finite
from lminf_export.tensors.stored import SourceTensor
from lminf_export.tensors.torch_dtypes import torch_dtype

FILE_NAME = "weights.safetensors"
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
        method: "keep" for the source's own blocks, "search" or "range" of `QuantizeConfig.scales`,
            "calibrate" for those that are made already.
        offset_dtype: element type of offsets.
        made: where the blocks are that are made already.
    """

    name: str
    tensor: SourceTensor
    form: BlockFormat
    dtype: str
    signed: bool
    method: str = "range"
    offset_dtype: str = "float32"
    made: SpooledBlocks | None = None

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
        if form.offsets:
            kind = safetensors_name(self.offset_dtype)
            entries.append(Entry(self.name + OFFSETS, kind, form.scales_shape))
        return tuple(entries)

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the packed rows as they are quantised, then scales, zero points and offsets.

        Raises:
            ModelError: a weight is not finite, or a scale does not fit into the element type.
        """
        scales, zero_points, offsets = [], [], []
        for blocks in self._blocks(max(1, BLOCK_ELEMENTS // self.form.columns)):
            yield as_signed(blocks.packed, self.form) if self.signed else blocks.packed
            scales.append(self._in_dtype(blocks.scales, self.dtype))
            if blocks.zero_points is not None:
                zero_points.append(blocks.zero_points)
            if blocks.offsets is not None:
                offsets.append(self._in_dtype(blocks.offsets, self.offset_dtype))
        for part in (*scales, *zero_points, *offsets):
            yield part.view(np.uint8)

    def _blocks(self, count: int) -> Iterator[Blocks]:
        """Yield the blocks of up to `count` rows at a time."""
        if self.made is not None:
            yield from self.made.rows(count)
            return
        if self.method == "keep":
            assert isinstance(self.tensor, GgufTensor)
            yield from kept_rows(self.tensor, self.form, count)
            return
        for rows in row_blocks(self.tensor, count):
            if not all_finite(rows):
                raise ModelError(f"tensor {self.name} holds values that are not finite")
            if self.method != "search":
                yield quantize_rows(rows, self.form)
            elif self.form.bits == 4:
                yield searched_rows(rows, self.form, self.dtype, positive=self.signed)
            else:
                yield rounded_rows(rows, self.form, self.dtype)

    def _in_dtype(self, numbers: NDArray[np.float32], dtype: str) -> NDArray[np.uint8]:
        converted = torch.from_numpy(numbers).to(torch_dtype(dtype))
        if not all_finite(converted):
            raise ModelError(
                f"tensor {self.name} has values beyond {dtype}'s range; export with --dtype float32"
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


def kept_piece(
    name: str, tensor: SourceTensor, kind: KeptType, dtype: str, *, signed: bool
) -> QuantizedWeight:
    """Describe a weight that keeps its own blocks.

    Args:
        name: the weight's own name.
        tensor: the source, (N, K), of blocks of that kind.
        kind: of its blocks.
        dtype: element type of activations; products of float16 take scales of float16 only.
        signed: see `QuantizedWeight`.
    """
    rows, columns = tensor.shape
    form = kind.form(rows, columns)
    scales = dtype if signed or dtype == "float16" else kind.scales
    return QuantizedWeight(name, tensor, form, scales, signed, "keep", dtype)


# A scale that float16 rounds by much more than this part makes a coarser grid.
_HALF_SMALLEST, _HALF_LARGEST = {4: 2.0**-18, 8: 2.0**-20}, 60000.0


def fits_half(tensor: SourceTensor, form: BlockFormat) -> bool:
    """Say whether float16 holds the scales of a matrix' blocks well enough.

    Blocks a thousand times smaller than the largest may have rougher scales: their errors are as
    much smaller.
    """
    largest, smallest = 0.0, np.inf
    for rows in row_blocks(tensor, max(1, BLOCK_ELEMENTS // tensor.shape[1])):
        padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % form.block_size))
        sizes = padded.unflatten(1, (-1, form.block_size)).abs_().amax(2)
        largest = max(largest, float(sizes.max()))
        smallest = min(smallest, float(sizes.where(sizes > 0, np.inf).min()))
    if not np.isfinite(largest) or largest == 0:
        return True  # the quantiser names what is not finite
    least = max(smallest, largest / 1000) / 2.0 ** (form.bits - 1)
    return largest < _HALF_LARGEST and least >= _HALF_SMALLEST[form.bits]
