"""Allocates arrays that stand side by side, and writes many in one call."""

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

from lminf_export.bundle.files import human_bytes
from lminf_export.errors import SessionError

_HUGE_PAGE = 2 * 2**20
_ALIGNMENT = 64


def zeros_together(arrays: Sequence[tuple[tuple[int, ...], np.dtype]]) -> list[np.ndarray]:
    """Return arrays of zeros that stand side by side, on huge pages where the system has them.

    A step reads all of its caches; with pages of 4 KiB address translation takes a good part of
    that time.

    Args:
        arrays: shape and element type of each.

    Raises:
        SessionError: the memory is short.
    """
    return arrays_in(zero_bytes(starts_together(arrays)[-1]), arrays)


def arrays_in(
    memory: np.ndarray, arrays: Sequence[tuple[tuple[int, ...], np.dtype]]
) -> list[np.ndarray]:
    """Return arrays over the beginning of some memory, side by side.

    Args:
        memory: bytes, as many as `starts_together` ends with.
        arrays: shape and element type of each.
    """
    buffer: Any = memory
    return [
        np.ndarray(shape, dtype, buffer, start)
        for (shape, dtype), start in zip(arrays, starts_together(arrays), strict=False)
    ]


def zero_bytes(size: int) -> np.ndarray:
    """Return bytes of zero, on huge pages where the system has them.

    Raises:
        SessionError: the memory is short.
    """
    try:
        if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return np.zeros(size, np.uint8)
        # Private: a shared mapping would be a file in memory. Freed with the last array.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (MemoryError, OSError):
        raise short_of_memory(size) from None
    with suppress(OSError):  # advice only: a kernel may have been built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def unset_bytes(size: int) -> np.ndarray:
    """Return bytes that are still to be written.

    Raises:
        SessionError: the memory is short.
    """
    try:
        return np.empty(size, np.uint8)
    except MemoryError:
        raise short_of_memory(size) from None


def short_of_memory(size: int) -> SessionError:
    """Return the error of caches for which so many bytes could not be had."""
    return SessionError(
        f"the memory is short: {human_bytes(size)} for caches could not be had; keep fewer states, "
        "or export with a smaller --window-size"
    )


def assign_together(targets: Sequence[np.ndarray], sources: Sequence[np.ndarray]) -> None:
    """Copy each source into its target, in one call: no interrupt comes between two of them.

    Args:
        targets: arrays of at least one dimension.
        sources: of the same element types, and of shapes that broadcast.
    """
    write: Any = setitem  # typed for lists only
    deque(map(write, targets, repeat(...), sources), maxlen=0)


def starts_together(arrays: Sequence[tuple[tuple[int, ...], np.dtype]]) -> list[int]:
    """Return where each array begins, and where the last one ends."""
    starts = [0]
    for shape, dtype in arrays:
        size = math.prod(shape) * dtype.itemsize
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return starts
