"""Copies of a bundle's files: of their own, and sharing blocks where the disk can do that."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

_PIECE = 1 << 30
# The kernel or the disk has no such call, or not between these two places.
_NOT_HERE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; what is written to one of the two never shows in the other.

    Args:
        source: the file, or a link to it.
        target: where nothing is yet; its folder exists.

    Raises:
        OSError: it cannot be read or written, or was cut short meanwhile.
    """
    with open(source, "rb", buffering=0) as read, open(target, "xb") as written:
        if not _copied_by_kernel(read.fileno(), written.fileno()):
            shutil.copyfileobj(read, written, 1 << 20)
            written.flush()
        if os.fstat(read.fileno()).st_size != os.fstat(written.fileno()).st_size:
            raise OSError(errno.EIO, "it changed while it was copied", str(source))


def _copied_by_kernel(read: int, written: int) -> bool:
    """Let the kernel copy all of a file; tell whether it can."""
    copy = getattr(os, "copy_file_range", None)
    if copy is None:
        return False
    copied = 0
    try:
        while count := copy(read, written, _PIECE):
            copied += count
    except OSError as error:
        if copied or error.errno not in _NOT_HERE:
            raise
        return False
    # Some file systems answer 0 for a file that has something in it.
    return copied > 0
