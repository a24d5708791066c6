"""Advice to the page cache: parts of a file that are needed soon, and parts not needed again.

Files about as large as the memory, read and written once, evict the pages of all other files, and
finding pages for them takes processor time.
"""

from __future__ import annotations

import os
from io import FileIO


def is_too_large(num_bytes: int) -> bool:
    """Say whether reading and writing this many bytes fills half of the memory or more."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system without these values
        return False
    return 4 * num_bytes > memory


def expect(file: FileIO, offset: int, count: int) -> None:
    """Ask for a part of a file to be read while something else happens."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, count, os.POSIX_FADV_WILLNEED)


def forget(file: FileIO, offset: int, count: int) -> None:
    """Release the cached pages of a part of a file; pages not on the disk yet stay."""
    if hasattr(os, "posix_fadvise") and count:
        os.posix_fadvise(file.fileno(), offset, count, os.POSIX_FADV_DONTNEED)
