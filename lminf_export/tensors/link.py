"""Hard links to a checkpoint's files instead of a copy of its tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lminf_export.errors import ModelError
from lminf_export.tensors.dtypes import BY_SAFETENSORS, safetensors_name
from lminf_export.tensors.stored import SourceTensor, StoredTensor


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
    kind, linked = safetensors_name(dtype), {}
    for name, tensor in weights.items():
        if not isinstance(tensor, StoredTensor):
            raise ModelError(
                f"tensor {name} is put together from others of the checkpoint, so it cannot be "
                f"linked; use --weights copy"
            )
        if tensor.dtype != kind:
            known = BY_SAFETENSORS.get(tensor.dtype)
            have = known.name if known else tensor.dtype
            raise ModelError(
                f"tensor {name} is {have}, and linked weights stay as they are: export with "
                f"--dtype {have}, or with --weights copy to convert them to {dtype}"
            )
        linked[name] = replace(tensor, path=folder / tensor.path.name)
    for path in sorted({tensor.path for tensor in weights.values()}):  # type: ignore[attr-defined]
        link_file(path, folder / path.name)
    return linked


def link_file(path: Path, target: Path) -> None:
    """Make a hard link to a file of weights, or to the one that a link leads to.

    Raises:
        ModelError: the target is on another disk, or the disk knows no hard links.
    """
    try:
        os.link(path.resolve(), target)
    except OSError as error:
        raise ModelError(
            f"{path.name} cannot be linked into the bundle ({error.strerror}): both must be on "
            f"one disk that knows hard links; use --weights copy"
        ) from error
