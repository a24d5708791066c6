"""The pieces of a weights file: one or a few tensors each, converted while they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from lminf_export.errors import ModelError
from lminf_export.tensors.dtypes import BY_SAFETENSORS, safetensors_name
from lminf_export.tensors.stored import BLOCK_BYTES, InFiles, SourceTensor, StoredTensor
from lminf_export.tensors.torch_dtypes import torch_dtype

# Bytes, or a part of a file that holds them already.
Chunk: TypeAlias = NDArray[np.uint8] | StoredTensor


@dataclass(frozen=True)
class Entry:
    """One tensor in the header of a safetensors file: name, safetensors' type, dimensions."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * BY_SAFETENSORS[self.dtype].itemsize


class Piece(Protocol):
    """Bytes of one or a few tensors that are written together, and made while they are read."""

    @property
    def tensor(self) -> SourceTensor:
        """The tensor that it is made of."""
        ...

    @property
    def entries(self) -> Sequence[Entry]:
        """The tensors, in the order of their bytes."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """Yield the bytes of all entries, in order."""
        ...


@dataclass(frozen=True)
class Converted:
    """A source tensor in another element type.

    Attributes:
        name: in the file.
        tensor: the source.
        dtype: "float32", "float16" or "bfloat16".
    """

    name: str
    tensor: SourceTensor
    dtype: str

    @property
    def entries(self) -> tuple[Entry]:
        """The one tensor."""
        return (Entry(self.name, safetensors_name(self.dtype), self.tensor.shape),)

    def chunks(self) -> Iterator[Chunk]:
        """Yield the converted bytes, block by block, or where they are if nothing is converted.

        Raises:
            ModelError: a value does not fit into float16.
        """
        parts = stored_parts(self.tensor)
        if parts and self.tensor.dtype == safetensors_name(self.dtype):
            yield from parts
            return
        dtype = torch_dtype(self.dtype)
        # Fresh memory for every block takes the system longer than the conversion does.
        buffer, scratch = np.empty(BLOCK_BYTES, np.uint8), torch.empty(BLOCK_BYTES // 2)
        blocks = (block for part in parts for block in part.blocks(buffer))
        for block in blocks if parts else self.tensor.blocks():
            converted = _convert(block, dtype, scratch)
            _check_range(self.name, block, converted)
            yield converted.view(torch.uint8).numpy()


def stored_parts(tensor: SourceTensor) -> list[StoredTensor]:
    """Return the parts of files that hold a tensor's bytes as they are, none if it is computed."""
    return (tensor.stored() or []) if isinstance(tensor, InFiles) else []


def read_chunks(piece: Piece) -> Iterator[NDArray[np.uint8]]:
    """Yield a piece's bytes, in order, those that lie in files read."""
    for chunk in piece.chunks():
        if isinstance(chunk, StoredTensor):
            yield from (block.view(torch.uint8).numpy() for block in chunk.blocks())
        else:
            yield chunk


def all_finite(tensor: torch.Tensor) -> bool:
    """Say whether a tensor holds no infinity and no NaN; `isfinite` takes much longer."""
    if not tensor.numel():
        return True
    return all(math.isfinite(extreme) for extreme in tensor.aminmax())  # NaN is both extremes


def _convert(block: torch.Tensor, dtype: torch.dtype, scratch: torch.Tensor) -> torch.Tensor:
    """Round elements to another type, those of two bytes over float32: torch is faster so."""
    if block.element_size() == 2 and len(block) <= len(scratch):
        block = scratch[: len(block)].copy_(block)
    return torch.empty(len(block), dtype=dtype).copy_(block)


def _check_range(name: str, before: torch.Tensor, after: torch.Tensor) -> None:
    if after.dtype != torch.float16 or before.dtype == torch.float16 or all_finite(after):
        return
    if bool((after.isinf() & before.isfinite()).any()):
        raise ModelError(
            f"tensor {name} has values beyond float16's range (65504); export with "
            f"--dtype bfloat16 or float32"
        )
