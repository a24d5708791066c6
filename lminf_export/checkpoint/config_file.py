"""A model's config.json, read and checked without the libraries that build the model.

They take seconds to load, which a file that can be refused by itself should not cost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lminf_export.checkpoint.config_numbers import check_config_numbers
from lminf_export.checkpoint.gguf.files import gguf_parts
from lminf_export.disk import is_dir, is_file, onnx_files, read_json, user_path
from lminf_export.errors import ModelError, shortened


def check_local_config(model: str | Path) -> None:
    """Check the config.json of a model that is a folder; one of the hub is not fetched for it.

    Raises:
        ModelError: as `read_config_file`, and as `gguf_parts` for a folder of GGUF files.
    """
    folder = user_path(model, ModelError)
    if is_dir(folder) and not gguf_parts(folder):
        read_config_file(folder, str(model))


def read_config_file(folder: Path, model: str) -> dict[str, Any]:
    """Read a model's config.json.

    Args:
        folder: the model's.
        model: the model as the user named it, for messages.

    Raises:
        ModelError: it is missing, damaged, or names no model type.
    """
    path = folder / "config.json"
    named = shortened(repr(model))
    if not is_file(path):
        if is_file(folder / "adapter_config.json"):
            raise ModelError(
                f"model {named} is an adapter; give the model it was trained on as --model, "
                f"and the adapter as --lora"
            )
        if graphs := onnx_files(folder):
            raise ModelError(
                f"model {named} has no {path.name} but an ONNX model, "
                f"{shortened(graphs[0].name, 40)}: it is rewritten, by lminf_export.rewrite or "
                f"lminf-export --model with the path of that file, and not exported"
            )
        raise ModelError(f"model {named} has no {path.name}; is it a Hugging Face model folder?")
    content = read_json(path, ModelError, f"{path.name} of model {named}")
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ModelError(f"{path.name} of model {named} names no model_type")
    check_config_numbers(content, model)
    return content
