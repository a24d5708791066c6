"""Element types, by safetensors' names and by ours."""

from __future__ import annotations

import torch

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
TYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def item_size(dtype: str) -> int:
    """Bytes of one element of "float32", "float16" or "bfloat16"."""
    return TORCH_TYPES[TYPE_NAMES[dtype]].itemsize
