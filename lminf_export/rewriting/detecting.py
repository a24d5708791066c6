"""Whether a model is an ONNX model, by its files alone. Imports no library."""

from __future__ import annotations

import json
from pathlib import Path

from lminf_export.bundle.links import followed
from lminf_export.disk import exists, is_dir, is_file, onnx_files, user_path
from lminf_export.errors import ModelError, shortened

SUFFIX = ".onnx"
_CHECKPOINTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
# Names of graphs that are a whole decoder, in the order in which they are looked for.
_NAMES = ("model.onnx", "decoder_with_past_model.onnx", "decoder_model_merged.onnx")


def find_onnx_model(model: str | Path) -> Path | None:
    """Return the file of an ONNX model; None for a path that is none.

    Args:
        model: a file, or a link to one, which is followed; or a folder that holds a graph and no
            checkpoint: of a folder of onnxruntime-genai the graph that its configuration names, of
            one of transformers.js that in `onnx/`.

    Raises:
        ModelError: the file is missing, or a folder holds several graphs and none is the usual.
    """
    path = user_path(model, ModelError)
    if path.suffix.lower() == SUFFIX:
        if is_file(path):
            return followed(path)
        if exists(path):
            return None if is_dir(path) and not onnx_files(path) else _in_folder(path)
        raise ModelError(f"model {shortened(repr(str(model)))}: no such file here")
    return _in_folder(path) if is_dir(path) else None


def _in_folder(folder: Path) -> Path | None:
    if any(next(folder.glob(kind), None) for kind in _CHECKPOINTS):
        return None
    found = onnx_files(folder)
    if not found:
        return None
    named = _named_by_genai(folder)
    by_name = {path.name: path for path in found} | {path.name.lower(): path for path in found}
    for name in (*([named] if named else []), *_NAMES):
        if name in by_name:
            return by_name[name]
    if len(found) == 1:
        return found[0]
    names = " and ".join(shortened(path.name, 40) for path in found[:2])
    raise ModelError(
        f"model folder {shortened(repr(folder.name))} holds several graphs, {names}; give the file "
        f"itself as --model"
    )


def _named_by_genai(folder: Path) -> str | None:
    try:
        content = json.loads((folder / "genai_config.json").read_bytes())
        name = content["model"]["decoder"]["filename"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None
