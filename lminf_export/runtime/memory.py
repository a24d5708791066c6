"""Checks free memory for caches, and allocates them."""

from __future__ import annotations

import math
import mmap
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import repeat
from operator import setitem
from typing import Any

import numpy as np
import psutil

from lminf_export.bundle.files import human_bytes
from lminf_export.bundle.manifest import Manifest
from lminf_export.errors import SessionError
from lminf_export.runtime.session import Session


def require_memory(manifest: Manifest, session: Session | None, batch_size: int) -> None:
    """Refuse caches that would exceed this machine's free memory once they are full.

    Args:
        manifest: of the bundle.
        session: what runs it; one whose caches are not in main memory answers for itself.
        batch_size: B, streams side by side.

    Raises:
        SessionError: with both numbers.
    """
    if session is not None and not session.caches_in_main_memory:
        return
    needed = manifest.cache_bytes_per_sequence * batch_size
    memory = psutil.virtual_memory()
    if needed > memory.available:
        raise SessionError(
            f"the caches of {batch_size} stream{'s' if batch_size > 1 else ''} take "
            f"{human_bytes(needed)} when full, this machine has {human_bytes(memory.available)} "
            f"free of {human_bytes(memory.total)}; export with a smaller --window-size"
            + (" or use a smaller batch" if batch_size > 1 else "")
        )


_HUGE_PAGE = 2 * 2**20
_ALIGNMENT = 64


def zeros_together(arrays: Sequence[tuple[tuple[int, ...], np.dtype]]) -> list[np.ndarray]:
    """Return arrays of zeros that stand side by side, on huge pages where the system has them.

    A step reads all of its caches; with pages of 4 KiB address translation takes a good part of
    that time.

    Args:
        arrays: shape and element type of each.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in arrays]
    starts = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]).tolist()
    whole = _zeros(starts[-1])
    return [
        whole[start : start + size].view(dtype).reshape(shape)
        for (shape, dtype), size, start in zip(arrays, sizes, starts, strict=False)
    ]


def assign_together(targets: Sequence[np.ndarray], sources: Sequence[np.ndarray]) -> None:
    """Copy each source into its target, in one call: no interrupt comes between two of them.

    Args:
        targets: arrays of at least one dimension.
        sources: of the same element types, and of shapes that broadcast.
    """
    write: Any = setitem  # typed for lists only
    deque(map(write, targets, repeat(...), sources), maxlen=0)


def _zeros(size: int) -> np.ndarray:
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(size, np.uint8)
    # Private: a shared mapping would be a file in memory. Freed with the last array.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # advice only: a kernel may have been built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
