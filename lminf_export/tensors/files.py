"""Which tensors a checkpoint holds, and which of them a graph asks for."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lminf_export.disk import is_file, onnx_files, read_json
from lminf_export.errors import ModelError, shortened
from lminf_export.tensors.dtypes import WEIGHT_DTYPES, safetensors_name
from lminf_export.tensors.stored import PickledTensor, RawTensor, SourceTensor, StoredTensor

FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
_WEIGHT_TYPES = tuple(safetensors_name(name) for name in WEIGHT_DTYPES)


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
                f"which is loaded with --allow-pickle only: give that, or convert it to safetensors"
            )
    if not names:
        if graphs := onnx_files(folder):
            raise ModelError(
                f"no weights in model folder {folder.name!r}: it holds an ONNX model, "
                f"{shortened(graphs[0].name, 40)}, which is rewritten, by lminf_export.rewrite or "
                f"lminf-export --model, and not exported"
            )
        raise ModelError(
            f"no weights in model folder {folder.name!r}: expected {FILE_NAME} or its shards"
        )
    tensors: dict[str, RawTensor] = {}
    for name in names:
        found = read(folder / name)
        if twice := tensors.keys() & found.keys():
            raise ModelError(
                f"tensor {shortened(min(twice))} is in {name} and in another weights file of model "
                f"folder {folder.name!r}; keep one checkpoint in it"
            )
        tensors.update(found)
    return tensors


def _shard_names(folder: Path, file_name: str, index_name: str) -> list[str]:
    """Return the one file, those of the index, or all of the same type."""
    suffix = Path(file_name).suffix
    index = folder / index_name
    if is_file(folder / file_name):
        return [file_name]  # as transformers does, before any index
    if not is_file(index):
        return sorted(path.name for path in folder.glob(f"*{suffix}"))
    content = read_json(index, ModelError, index_name, "fetch it again")
    table = content.get("weight_map") if isinstance(content, dict) else None
    files: list[Any] = list(table.values()) if isinstance(table, dict) else [None]
    if not all(isinstance(name, str) and name.endswith(suffix) for name in files):
        raise ModelError(
            f"{index_name} is damaged: its weight_map must map tensors to {suffix} files; "
            f"fetch it again"
        )
    for name in files:
        if Path(name).name != name:
            raise ModelError(
                f"{index_name} names {shortened(repr(name))}, which is outside the model's folder"
            )
    return sorted(set(files))


def _read_pickle(path: Path) -> dict[str, PickledTensor]:
    """Map a file of `torch.save` into memory; nothing but tensors is unpickled."""
    if not is_file(path):
        raise ModelError(
            f"weights file {shortened(path.name)} is missing; the checkpoint is incomplete"
        )
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
    if not is_file(path):
        raise ModelError(
            f"weights file {shortened(path.name)} is missing; the checkpoint is incomplete"
        )
    try:
        # The library checks types, sizes and that the tensors tile the file without a gap.
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"weights file {path.name} ({path.stat().st_size} bytes) is truncated or damaged: "
            f"{shortened(str(error), 90)}; fetch it again"
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
        if tensor.dtype not in _WEIGHT_TYPES:
            raise ModelError(
                f"tensor {candidates[0]} has element type {tensor.dtype}; expected one of "
                f"{', '.join(_WEIGHT_TYPES)}; a quantised checkpoint says in config.json, under "
                f"quantization_config, how it is read"
            )
        found[weight] = tensor
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(f"the checkpoint lacks {', '.join(missing[:3])}{more}")
    return found
