"""Telling the system what of a file it will need in memory soon, and what no more.

Files about as large as the memory, read and written once, push out what the system holds of all
others, and finding pages for them takes the processor's time.
"""

from __future__ import annotations

import os
from io import FileIO


def is_too_large(num_bytes: int) -> bool:
    """Say whether reading and writing so many bytes fills half of the memory or more."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system that does not tell
        return False
    return 4 * num_bytes > memory


def expect(file: FileIO, offset: int, count: int) -> None:
    """Ask for a part of a file to be read while something else happens."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, count, os.POSIX_FADV_WILLNEED)


def forget(file: FileIO, offset: int, count: int) -> None:
    """Give back the memory that holds a part of a file; what is not on the disk yet stays."""
    if hasattr(os, "posix_fadvise") and count:
        os.posix_fadvise(file.fileno(), offset, count, os.POSIX_FADV_DONTNEED)
