"""Weights, tensor by tensor, from memory-mapped safetensors to one safetensors file.

Nothing is held but a block of a few megabytes: pages of the source belong to the file, and
the destination is written as it is converted. The bundle keeps the layouts of transformers and
its names (the checkpoint's own, but for what `conversion` renames and merges), so any safetensors
reader can open it, and the ONNX initializers point into it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
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
# What a file may hold beside them: the numbers of quantised tensors, which `dequantize` reads.
STORED_TYPES = {
    **TORCH_TYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_RAW_TYPES = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
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


class RawTensor(SourceTensor, Protocol):
    """A tensor of a file, of which any part can be read."""

    def part(self, *index: slice | int) -> torch.Tensor:
        """Return a part, as it is stored; indices as numpy has them."""
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
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, self.length, BLOCK_BYTES):
                count = min(BLOCK_BYTES, self.length - start)
                file.seek(self.offset + start)
                piece = np.fromfile(file, np.uint8, count)
                if len(piece) != count:
                    raise ModelError(f"weights file {self.path.name} was cut while it was read")
                yield torch.from_numpy(piece).view(STORED_TYPES[self.dtype])

    def at(self, index: int) -> StoredTensor:
        """Return the sub-tensor at an index of the first dimension."""
        length = self.length // self.shape[0]
        offset = self.offset + index * length
        return StoredTensor(self.path, self.dtype, self.shape[1:], offset, length)

    def part(self, *index: slice | int) -> torch.Tensor:
        """Return a copy of a part, as it is stored.

        Raises:
            ModelError: its element type is none of STORED_TYPES.
        """
        kind = STORED_TYPES.get(self.dtype)
        if kind is None:
            raise ModelError(f"a tensor of {self.path.name} has element type {self.dtype}")
        raw = np.memmap(self.path, _RAW_TYPES[kind.itemsize], "r", self.offset, self.shape)
        return torch.from_numpy(np.array(raw[index])).view(kind)

    def load(self) -> torch.Tensor:
        """Return a copy of the whole tensor."""
        blocks = list(self.blocks())
        if not blocks:
            return torch.empty(self.shape, dtype=STORED_TYPES[self.dtype])
        return torch.cat(blocks).reshape(self.shape)


@dataclass(frozen=True)
class PickledTensor:
    """One tensor inside a file of `torch.save`, on pages of that file."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        """safetensors' name of its element type, or torch's where it has none here."""
        names = {kind: name for name, kind in STORED_TYPES.items()}
        return names.get(self.tensor.dtype, str(self.tensor.dtype).removeprefix("torch."))

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return tuple(self.tensor.shape)

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors."""
        flat = self.tensor.flatten()  # a copy only where the tensor was stored transposed
        return iter(flat.split(max(1, BLOCK_BYTES // flat.element_size())))

    def part(self, *index: slice | int) -> torch.Tensor:
        """Return a part, as it is stored."""
        return self.tensor[index]

    def at(self, index: int) -> PickledTensor:
        """Return the sub-tensor at an index of the first dimension."""
        return PickledTensor(self.tensor[index])


def read_checkpoint(folder: Path, *, allow_pickle: bool = False) -> dict[str, RawTensor]:
    """List the tensors of a checkpoint, sharded or not, checking every file's extent.

    Args:
        folder: the model's folder.
        allow_pickle: where there are no safetensors, read `.bin` files. Only tensors are
            unpickled (torch's `weights_only`); nothing a file asks for is run.

    Raises:
        ModelError: files are missing, truncated or not safetensors.
    """
    read: Callable[[Path], Mapping[str, RawTensor]] = read_header
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
    tensors: dict[str, RawTensor] = {}
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
        # torch's own words are not passed on: they advise unpickling everything.
        raise ModelError(
            f"weights file {path.name} cannot be read as plain tensors: it is damaged, or holds "
            f"other objects, which are not unpickled; get or make it as safetensors"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"weights file {path.name} holds no table of tensors")
    return {
        str(name): PickledTensor(tensor)
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor)
    }


def read_checkpoint_file(path: Path) -> dict[str, RawTensor]:
    """List the tensors of one file, safetensors or, by its suffix, a pickle.

    Raises:
        ModelError: as `read_checkpoint`.
    """
    return dict(_read_pickle(path) if path.suffix == ".bin" else read_header(path))


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
                f"{', '.join(TORCH_TYPES)}; a quantised checkpoint says in config.json, under "
                f"quantization_config, how it is read"
            )
        found[weight] = tensor
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(f"the checkpoint lacks {', '.join(missing[:3])}{more}")
    return found


@dataclass(frozen=True)
class Entry:
    """One tensor as a safetensors file is to hold it: name, safetensors' type, dimensions."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * STORED_TYPES[self.dtype].itemsize


class Piece(Protocol):
    """What is written in one go: the bytes of one or a few tensors, made while they are read."""

    @property
    def entries(self) -> Sequence[Entry]:
        """The tensors, in the order of their bytes."""
        ...

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
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
        return (Entry(self.name, TYPE_NAMES[self.dtype], self.tensor.shape),)

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the converted bytes, block by block.

        Raises:
            ModelError: a value does not fit into float16.
        """
        for block in self.tensor.blocks():
            converted = block.to(TORCH_TYPES[TYPE_NAMES[self.dtype]])
            _check_range(self.name, block, converted)
            yield converted.view(torch.uint8).numpy()


def write_pieces(
    path: Path, pieces: Sequence[Piece], progress: Callable[[int], None] = lambda _: None
) -> tuple[dict[str, StoredTensor], str]:
    """Write tensors to one safetensors file, each read, converted and written block by block.

    Args:
        path: the file to write.
        pieces: what it is to hold.
        progress: told the bytes written by each block.

    Returns:
        Where each tensor now is, and the file's SHA-256, so that nobody must read it again.

    Raises:
        ModelError: a value does not fit into the element type.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in (entry for piece in pieces for entry in piece.entries):
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.length],
        }
        offset += entry.length
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # tensors start aligned
    start = np.frombuffer(struct.pack("<Q", len(encoded)) + encoded, np.uint8)
    chunks = (chunk for piece in pieces for chunk in piece.chunks())
    digest = _write_hashed(path, start, chunks, progress)
    return read_header(path), digest


def _one_ahead(chunks: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """Yield chunks while the next one is already being read and converted in a thread."""
    iterator = iter(chunks)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, None)
        while (chunk := coming.result()) is not None:
            coming = pool.submit(next, iterator, None)
            yield chunk


def _write_hashed(
    path: Path,
    start: NDArray[np.uint8],
    chunks: Iterable[NDArray[np.uint8]],
    progress: Callable[[int], None],
) -> str:
    """Write a file and return its SHA-256; reading ahead, hashing and writing run side by side."""
    digest = hashlib.sha256(start.data)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        file.write(start.data)
        hashing = pool.submit(lambda: None)
        for chunk in _one_ahead(chunks):
            hashing.result()  # one block at a time waits to be hashed
            hashing = pool.submit(digest.update, chunk.data)
            left = chunk.data.cast("B")
            while left:
                written = file.write(left)
                left = left[written:]
            progress(chunk.nbytes)
        hashing.result()
    return digest.hexdigest()


def link_weights(
    folder: Path, weights: Mapping[str, SourceTensor], dtype: str
) -> dict[str, StoredTensor]:
    """Put hard links to a checkpoint's files into a folder, instead of a copy of its tensors.

    Args:
        folder: where to.
        weights: name → source tensor.
        dtype: the element type they must have.

    Returns:
        Where each tensor now is.

    Raises:
        ModelError: a tensor would have to be converted or put together, or the folder is on
            another disk than the checkpoint.
    """
    kind, linked = TYPE_NAMES[dtype], {}
    for name, tensor in weights.items():
        if not isinstance(tensor, StoredTensor):
            raise ModelError(
                f"tensor {name} is put together from others of the checkpoint, so it cannot be "
                f"linked; use --weights copy"
            )
        if tensor.dtype != kind:
            have = next((n for n, k in TYPE_NAMES.items() if k == tensor.dtype), tensor.dtype)
            raise ModelError(
                f"tensor {name} is {have}, and linked weights stay as they are: export with "
                f"--dtype {have}, or with --weights copy to convert them to {dtype}"
            )
        linked[name] = replace(tensor, path=folder / tensor.path.name)
    for path in sorted({tensor.path for tensor in weights.values()}):  # type: ignore[attr-defined]
        try:
            os.link(path.resolve(), folder / path.name)
        except OSError as error:
            raise ModelError(
                f"{path.name} cannot be linked into the bundle ({error.strerror}): both must be on "
                f"one disk that knows hard links; use --weights copy"
            ) from error
    return linked


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
