"""Reads weights from the disk in pieces as large as huge pages, before they are used.

Steps read all weights through the mapping of their file. Linux maps a piece of 2 MiB as one page
if the page cache holds it as one, as it does of a file that is first read so; read here and there,
as a runtime does while it loads, a file stays in small pages, through which memory streams slower.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import psutil

_PIECE = 64 * 2**20
_LEAST = 8 * 2**20
# Of memory that is free or can be freed: what else is cached may be worth as much.
_MOST_OF_MEMORY = 0.5
_POPULATE_READ = 22  # of Linux, which the module mmap does not name
_SAMPLES = 64


def read_ahead(paths: Iterable[Path]) -> None:
    """Read files into the page cache that are not there yet, on Linux.

    It is left out for small files, and for large ones beside the memory; nothing depends on it.

    Args:
        paths: of existing files.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    for path in paths:
        size = path.stat().st_size
        if _LEAST <= size <= _MOST_OF_MEMORY * psutil.virtual_memory().available:
            _read(path)


def _read(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        if _is_cached(mapped):
            return
        try:
            mapped.madvise(mmap.MADV_HUGEPAGE)
            for start in range(0, len(mapped), _PIECE):
                mapped.madvise(_POPULATE_READ, start, min(_PIECE, len(mapped) - start))
        except OSError:  # a system older than the advice; a step reads what it needs
            return


def _is_cached(mapped: mmap.mmap) -> bool:
    """Tell whether most of some pages of a file are in memory."""
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    if mincore is None:
        return True
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_ubyte)]
    start, told, found = int(np.frombuffer(mapped, np.uint8).ctypes.data), ctypes.c_ubyte(), 0
    for place in np.linspace(0, len(mapped) - 1, _SAMPLES, dtype=np.int64).tolist():
        page = (start + place) // mmap.PAGESIZE * mmap.PAGESIZE
        found += mincore(page, 1, ctypes.byref(told)) == 0 and told.value & 1
    return found > _SAMPLES // 2
