"""Element types as torch's objects; the table is `tensors.dtypes`."""

from __future__ import annotations

import torch

from lminf_export.tensors.dtypes import BY_SAFETENSORS


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's type of an element type, by our name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def stored_torch_dtype(safetensors_name: str) -> torch.dtype:
    """Return torch's type of an element type, by its name in a safetensors file.

    Raises:
        KeyError: the table has no such type.
    """
    return torch_dtype(BY_SAFETENSORS[safetensors_name].name)


def dtype_name(dtype: torch.dtype) -> str:
    """Return our name of torch's type, which need not be in the table."""
    return str(dtype).removeprefix("torch.")
