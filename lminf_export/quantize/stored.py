"""Quantised weights in the bundle's weights file: written and read row by row.

A weight `x.weight` (N, K) becomes tensors `x.weight.quantized`, `x.weight.scales` and, where it
is asymmetric, `x.weight.zero_points`, one behind the other. Rows go through memory a few at a
time, so a lm_head of 128,000 rows costs no more than any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lminf_export.errors import ModelError
from lminf_export.quantize.config import CHANNEL_DTYPES
from lminf_export.quantize.formats import (
    BlockFormat,
    Blocks,
    as_signed,
    as_unsigned,
    dequantize_rows,
    quantize_rows,
)
from lminf_export.tensors.dtypes import safetensors_name
from lminf_export.tensors.pieces import Entry, all_finite
from lminf_export.tensors.stored import SourceTensor, StoredTensor
from lminf_export.tensors.torch_dtypes import torch_dtype

FILE_NAME = "weights.safetensors"
QUANTIZED, SCALES, ZERO_POINTS = ".quantized", ".scales", ".zero_points"
# Elements quantised in one go: 32 MB of float32, which the quantiser wants transposed as well.
_ELEMENTS = 2**23


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight to be quantised: a piece of `weights.write_pieces`.

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
        for rows in row_blocks(self.tensor, max(1, _ELEMENTS // self.form.columns)):
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
        for rows in row_blocks(self.tensor, max(1, _ELEMENTS // self.tensor.shape[1])):
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
    """Yield the rows of a tensor (N, K), so many at a time, as float32 (R, K)."""
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


@dataclass(frozen=True)
class DequantizedWeight:
    """A stored quantised weight as the float32 values it stands for: a `SourceTensor`.

    Attributes:
        form: how it is stored.
        signed: see `QuantizedWeight`.
        packed: where its integers are.
        scales: where its scales are.
        zero_points: where its zero points are; None where symmetric.
    """

    form: BlockFormat
    signed: bool
    packed: StoredTensor
    scales: StoredTensor
    zero_points: StoredTensor | None

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
        step = max(1, _ELEMENTS // self.form.columns)
        for start in range(0, self.form.rows, step):
            rows = slice(start, start + step)
            packed = _rows(self.packed, rows).numpy()
            if self.signed:
                packed = as_unsigned(packed, self.form)
            zero_points = None
            if self.zero_points is not None:
                zero_points = _rows(self.zero_points, rows).numpy()
            scales = _rows(self.scales, rows).to(torch.float32).numpy()
            dense = dequantize_rows(Blocks(packed, scales, zero_points), self.form)
            yield torch.from_numpy(np.ascontiguousarray(dense)).flatten()

    def at(self, index: int) -> SourceTensor:
        """Projections are matrices; nobody takes one apart."""
        raise NotImplementedError


@dataclass(frozen=True)
class DequantizedChannels:
    """A stored weight with one scale a row as the float32 values it stands for: a `SourceTensor`.

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
        step = max(1, _ELEMENTS // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            scale = _rows(self.scales, rows).to(torch.float32)[:, None]
            yield (_rows(self.packed, rows).to(torch.float32) * scale).flatten()

    def at(self, index: int) -> SourceTensor:
        """Projections are matrices; nobody takes one apart."""
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
    block_size: int,
    signed: bool,
) -> dict[str, SourceTensor]:
    """Return the tensors of a weights file under the model's names, quantised ones dequantised.

    Args:
        stored: of `weights.read_header`.
        shapes: the model's own shapes, by name.
        block_size: columns that share a scale.
        signed: see `QuantizedWeight`.

    Raises:
        ModelError: a quantised tensor belongs to no weight of the model.
    """
    found: dict[str, SourceTensor] = {}
    for name, tensor in stored.items():
        weight = name.removesuffix(QUANTIZED)
        if name.endswith((SCALES, ZERO_POINTS)) and name.rpartition(".")[0] + QUANTIZED in stored:
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
        zero_points = stored.get(weight + ZERO_POINTS)
        integers = columns if signed else block_size
        bits = tensor.shape[-1] * 8 // integers
        found[weight] = DequantizedWeight(
            BlockFormat(rows, columns, bits, block_size, zero_points is None),
            signed,
            tensor,
            stored[weight + SCALES],
            zero_points,
        )
    return found
