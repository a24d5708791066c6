"""Memory of a GPU as the stages of onnxruntime_gpu see it: how much, and caches filled on it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from scripts.gpu.onnxruntime_gpu import Run

_DEVICE_TO_DEVICE = 3
_BLOCK_BYTES = 256 * 2**20


def device_bytes(run: Run) -> int:
    """Return the bytes in use on the GPU by all processes; 0 without one."""
    if not run.on_gpu:
        return 0
    free, total = _memory()
    return total - free


def free_bytes() -> int:
    """Return the bytes that are free on the GPU."""
    return _memory()[0]


def _memory() -> tuple[int, int]:
    import torch

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return int(free), int(total)


def model_bytes(folder: Path) -> int:
    """Return the bytes of a checkpoint's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def fill_caches(run: Run, model: Any, state: Any) -> None:
    """Fill a state's caches with random numbers: on the GPU, since there may be 100 GB of them."""
    if not run.on_gpu:
        model.session.fill(state, np.random.default_rng(1))
        return
    import torch

    block = torch.randn(_BLOCK_BYTES // 2, dtype=torch.float16, device="cuda")
    torch.cuda.synchronize()
    cudart = ctypes.CDLL("libcudart.so.13")
    for cache in state._bound.caches:
        value = cache._value
        left, address = value.tensor_size_in_bytes(), value.data_ptr()
        while left:
            size = min(left, _BLOCK_BYTES)
            status = cudart.cudaMemcpy(
                ctypes.c_void_p(address),
                ctypes.c_void_p(block.data_ptr()),
                ctypes.c_size_t(size),
                _DEVICE_TO_DEVICE,
            )
            if status != 0:
                raise RuntimeError(f"cudaMemcpy: error {status}")
            address, left = address + size, left - size
    torch.cuda.synchronize()
