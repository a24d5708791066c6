"""Keeps the resident pages of a bundle's mapped weights few, while something else needs memory.

onnxruntime maps the weights files. Their pages cost nothing that the system could not take back,
but they count as the process's, and a step touches all of them. A thread gives them back again
and again; touched pages return from the page cache.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lminf_export.bundle.folder import Bundle

# Resident pages of files from which on they are given back, and how often that is looked at.
MOST_BYTES = 2 * 2**30
_SECONDS = 0.05
_STATUS, _MAPS = Path("/proc/self/status"), Path("/proc/self/smaps")


@contextmanager
def few_resident_pages(bundle: Bundle) -> Iterator[None]:
    """Give resident pages of a bundle's large weights back while the context lasts, on Linux."""
    files = [bundle.path / name for name in bundle.manifest.files_of("weights")]
    size = sum(path.stat().st_size for path in files)
    if size < MOST_BYTES or not hasattr(mmap, "MADV_DONTNEED") or not _MAPS.is_file():
        yield
        return
    ended = threading.Event()
    names = {str(path.resolve()) for path in files}
    thread = threading.Thread(target=_give_back, args=(names, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _give_back(names: set[str], ended: threading.Event) -> None:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    ranges: list[tuple[int, int]] = []
    while not ended.wait(_SECONDS):
        if _resident_file_bytes() < MOST_BYTES:
            continue
        ranges = ranges or unchanged_ranges(names)
        for start, size in ranges:
            library.madvise(start, size, mmap.MADV_DONTNEED)


def _resident_file_bytes() -> int:
    lines = _STATUS.read_text().splitlines()
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("RssFile")), 0)


def unchanged_ranges(names: set[str]) -> list[tuple[int, int]]:
    """Return start and size of this process's mappings of files in which nothing was written.

    Pages that were written to are private copies, which giving back would lose.
    """
    found: list[tuple[int, int]] = []
    current: tuple[int, int] | None = None
    for line in _MAPS.read_text().splitlines():
        words = line.split(maxsplit=5)
        if "-" in words[0] and not words[0].endswith(":"):
            start, stop = (int(x, 16) for x in words[0].split("-"))
            is_ours = len(words) == 6 and words[5] in names
            current = (start, stop - start) if is_ours else None
        elif words[0] == "Anonymous:" and current is not None:
            if words[1] == "0":
                found.append(current)
            current = None
    return found
