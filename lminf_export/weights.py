"""Weights, tensor by tensor, from memory-mapped safetensors to one safetensors file.

Nothing is held but a block of a few megabytes: pages of the source belong to the file, and
the destination is written as it is converted. The bundle keeps the layouts of transformers and
its names (the checkpoint's own, but for what `conversion` renames and merges), so any safetensors
reader can open it, and the ONNX initializers point into it.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch
from safetensors import SafetensorError, safe_open

from lminf_export.errors import ModelError

FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
BLOCK_BYTES = 32 * 2**20

TORCH_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
TYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def item_size(dtype: str) -> int:
    """Bytes of one element of "float32", "float16" or "bfloat16"."""
    return TORCH_TYPES[TYPE_NAMES[dtype]].itemsize


class SourceTensor(Protocol):
    """A tensor of a checkpoint, read when it is written."""

    @property
    def dtype(self) -> str:
        """safetensors' name of its element type."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        ...

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors."""
        ...

    def at(self, index: int) -> SourceTensor:
        """Return the sub-tensor at an index of the first dimension."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """One tensor inside a safetensors file.

    Attributes:
        path: the file.
        dtype: safetensors' name of its element type.
        shape: dimensions.
        offset: first byte in the file.
        length: bytes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors on pages of the file."""
        if not self.length:
            return
        raw = np.memmap(self.path, np.uint8, "r", self.offset, (self.length,))
        for start in range(0, self.length, BLOCK_BYTES):
            piece = raw[start : start + BLOCK_BYTES]
            # One block is copied: torch wants memory it may write to.
            yield torch.from_numpy(np.array(piece)).view(TORCH_TYPES[self.dtype])

    def at(self, index: int) -> StoredTensor:
        """Return the sub-tensor at an index of the first dimension."""
        length = self.length // self.shape[0]
        offset = self.offset + index * length
        return StoredTensor(self.path, self.dtype, self.shape[1:], offset, length)

    def load(self) -> torch.Tensor:
        """Return a copy of the whole tensor."""
        blocks = list(self.blocks())
        if not blocks:
            return torch.empty(self.shape, dtype=TORCH_TYPES[self.dtype])
        return torch.cat(blocks).reshape(self.shape)


@dataclass(frozen=True)
class PickledTensor:
    """One tensor inside a file of `torch.save`, on pages of that file."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        """safetensors' name of its element type, or torch's where it has none here."""
        names = {kind: name for name, kind in TORCH_TYPES.items()}
        return names.get(self.tensor.dtype, str(self.tensor.dtype).removeprefix("torch."))

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return tuple(self.tensor.shape)

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors."""
        flat = self.tensor.flatten()  # a copy only where the tensor was stored transposed
        return iter(flat.split(max(1, BLOCK_BYTES // flat.element_size())))

    def at(self, index: int) -> PickledTensor:
        """Return the sub-tensor at an index of the first dimension."""
        return PickledTensor(self.tensor[index])


def read_checkpoint(folder: Path, *, allow_pickle: bool = False) -> dict[str, SourceTensor]:
    """List the tensors of a checkpoint, sharded or not, checking every file's extent.

    Args:
        folder: the model's folder.
        allow_pickle: where there are no safetensors, read `.bin` files. Only tensors are
            unpickled (torch's `weights_only`); nothing a file asks for is run.

    Raises:
        ModelError: files are missing, truncated or not safetensors.
    """
    read: Callable[[Path], Mapping[str, SourceTensor]] = read_header
    names = _shard_names(folder, FILE_NAME, INDEX_NAME)
    if not names:
        names, read = _shard_names(folder, PICKLE_NAME, PICKLE_INDEX_NAME), _read_pickle
        if names and not allow_pickle:
            raise ModelError(
                f"no weights in model folder {folder.name!r}: it holds {names[0]}, a pickle, "
                f"which is not loaded unasked: convert it to safetensors, or give --allow-pickle"
            )
    if not names:
        raise ModelError(
            f"no weights in model folder {folder.name!r}: expected {FILE_NAME} or its shards"
        )
    tensors: dict[str, SourceTensor] = {}
    for name in names:
        found = read(folder / name)
        if twice := tensors.keys() & found.keys():
            raise ModelError(
                f"tensor {min(twice)} is in {name} and in another weights file of model folder "
                f"{folder.name!r}; keep one checkpoint in it"
            )
        tensors.update(found)
    return tensors


def _shard_names(folder: Path, file_name: str, index_name: str) -> list[str]:
    """Return the one file, those of the index, or all of the same type."""
    suffix = Path(file_name).suffix
    index = folder / index_name
    if (folder / file_name).is_file():
        return [file_name]  # as transformers does, before any index
    if not index.is_file():
        return sorted(path.name for path in folder.glob(f"*{suffix}"))
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not all(isinstance(name, str) and name.endswith(suffix) for name in names):
            raise ValueError(f"it must map tensors to {suffix} files")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{index_name} is damaged: {error}; fetch it again") from error
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index_name} names {name!r}, which is outside the model's folder")
    return names


def _read_pickle(path: Path) -> dict[str, PickledTensor]:
    """Map a file of `torch.save` into memory; nothing but tensors is unpickled."""
    if not path.is_file():
        raise ModelError(f"weights file {path.name} is missing; the checkpoint is incomplete")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"weights file {path.name} cannot be read as plain tensors ({reason}); convert it to "
            f"safetensors"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"weights file {path.name} holds no table of tensors")
    return {
        str(name): PickledTensor(tensor)
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor)
    }


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of one safetensors file, checked against the file by its own library.

    Raises:
        ModelError: the file is missing, truncated or damaged.
    """
    if not path.is_file():
        raise ModelError(f"weights file {path.name} is missing; the checkpoint is incomplete")
    try:
        # The library checks types, sizes and that the tensors tile the file without a gap.
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"weights file {path.name} ({path.stat().st_size} bytes) is truncated or damaged: "
            f"{error}; fetch it again"
        ) from error
    with path.open("rb") as file:
        (count,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(count))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + count + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def find_weights(
    checkpoint: Mapping[str, SourceTensor],
    names: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, SourceTensor]:
    """Match the graph's weights to the checkpoint's tensors.

    Args:
        checkpoint: tensors by name.
        names: for each weight of the graph, the names it may have (tied weights have several).
        shapes: for each weight of the graph, its shape.

    Raises:
        ModelError: a weight is missing, has another shape or is not floating-point.
    """
    found, missing = {}, []
    for weight, candidates in names.items():
        tensor = next((checkpoint[n] for n in candidates if n in checkpoint), None)
        if tensor is None:
            missing.append(candidates[0])
            continue
        if tensor.shape != shapes[weight]:
            raise ModelError(
                f"tensor {candidates[0]}: the checkpoint has shape {list(tensor.shape)}, "
                f"config.json asks for {list(shapes[weight])}"
            )
        if tensor.dtype not in TORCH_TYPES:
            raise ModelError(
                f"tensor {candidates[0]} has element type {tensor.dtype}; expected one of "
                f"{', '.join(TORCH_TYPES)} (quantised checkpoints are not supported)"
            )
        found[weight] = tensor
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(f"the checkpoint lacks {', '.join(missing[:3])}{more}")
    return found


def write_weights(
    path: Path,
    weights: Mapping[str, SourceTensor],
    dtype: str,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, StoredTensor]:
    """Write tensors to one safetensors file, converted block by block.

    Args:
        path: the file to write.
        weights: name in the file → source tensor.
        dtype: "float32", "float16" or "bfloat16".
        progress: told the bytes written by each block.

    Returns:
        Where each tensor now is.

    Raises:
        ModelError: a value does not fit into float16.
    """
    kind = TYPE_NAMES[dtype]
    width = TORCH_TYPES[kind].itemsize
    header, offset = {}, 0
    for name, tensor in weights.items():
        length = int(np.prod(tensor.shape, dtype=np.int64)) * width
        header[name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + length],
        }
        offset += length
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # tensors start aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, tensor in weights.items():
            for block in tensor.blocks():
                converted = block.to(TORCH_TYPES[kind])
                _check_range(name, block, converted)
                progress(file.write(converted.view(torch.uint8).numpy().data))
    return read_header(path)


def attach(model: ir.Model, stored: Mapping[str, StoredTensor]) -> None:
    """Point a graph's initializers into a safetensors file beside the model.

    Args:
        model: its initializers without data whose names are keys of `stored`.
        stored: where each tensor is.
    """
    for name, tensor in stored.items():
        value = model.graph.initializers[name]
        assert value.dtype is not None
        value.const_value = ir.ExternalTensor(
            tensor.path.name,
            tensor.offset,
            tensor.length,
            value.dtype,
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=tensor.path.parent,
        )


def _check_range(name: str, before: torch.Tensor, after: torch.Tensor) -> None:
    if after.dtype != torch.float16 or before.dtype == torch.float16:
        return
    if bool((after.isinf() & before.isfinite()).any()):
        raise ModelError(
            f"tensor {name} has values beyond float16's range (65504); export with "
            f"--dtype bfloat16 or float32"
        )
