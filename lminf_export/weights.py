"""Weights, tensor by tensor, from memory-mapped safetensors to one safetensors file.

Nothing is held but a block of a few megabytes: pages of the source belong to the file, and
the destination is written as it is converted. The bundle keeps the checkpoint's own names and
layouts, so any safetensors reader can open it, and the ONNX initializers point into it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from lminf_export.errors import ModelError

FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
BLOCK_BYTES = 32 * 2**20
MAX_HEADER_BYTES = 100 * 2**20

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

    def load(self) -> torch.Tensor:
        """Return a copy of the whole tensor."""
        blocks = list(self.blocks())
        if not blocks:
            return torch.empty(self.shape, dtype=TORCH_TYPES[self.dtype])
        return torch.cat(blocks).reshape(self.shape)


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint, sharded or not, checking every file's extent.

    Raises:
        ModelError: files are missing, truncated or not safetensors.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{INDEX_NAME} is damaged: {error!r}; fetch it again") from error
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        hint = (
            f"it holds {pickles[0]}, a pickle, which is never loaded: convert it to safetensors"
            if pickles
            else "expected model.safetensors or its shards"
        )
        raise ModelError(f"no weights in model folder {folder.name!r}: {hint}")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{INDEX_NAME} names {name!r}, which is outside the model's folder")
        tensors.update(read_header(folder / name))
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of one safetensors file and check it against the file's size.

    Raises:
        ModelError: the file is missing, truncated or damaged.
    """
    if not path.is_file():
        raise ModelError(f"weights file {path.name} is missing; the checkpoint is incomplete")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        count = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= count <= min(size - 8, MAX_HEADER_BYTES):
            raise ModelError(f"weights file {path.name} is damaged: no safetensors header")
        try:
            header = json.loads(file.read(count))
            header.pop("__metadata__", None)
            tensors = {
                name: StoredTensor(
                    path,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    8 + count + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(
                f"weights file {path.name} is damaged: unreadable header ({error!r})"
            ) from error
    end = max((t.offset + t.length for t in tensors.values()), default=8 + count)
    if end != size:
        raise ModelError(
            f"weights file {path.name} is truncated or damaged: its header asks for {end} bytes, "
            f"the file has {size}; fetch it again"
        )
    return tensors


def find_weights(
    checkpoint: Mapping[str, StoredTensor],
    names: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, StoredTensor]:
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
    weights: Mapping[str, StoredTensor],
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
