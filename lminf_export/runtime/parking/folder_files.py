"""Files of a store's folder, where others may have put what is no file."""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path

from lminf_export.runtime.parking.objects import KEY, TURN

logger = logging.getLogger(__name__)

# Begins the names of files that are still written.
PART = ".part-"
# Others do not get the file, and a link that somebody has put there is not followed.
SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW
# Nor is a pipe waited for.
_READING = os.O_RDONLY | os.O_NONBLOCK | SAFELY


def size(entry: os.DirEntry[str]) -> int:
    """Return a file's bytes; 0 for what is no file."""
    return entry.stat().st_size if entry.is_file(follow_symlinks=False) else 0


def content_of(path: Path, most: int) -> bytes:
    """Return a file's first bytes; none of what is no file.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    try:
        handle = os.open(path, _READING)
    except OSError as error:
        if error.errno == errno.ENXIO or path.is_symlink():  # a socket, or a link
            return b""
        raise
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return b""
        with open(handle, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file that may be gone already, or what somebody has put in its place."""
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):
        if not path.is_dir() or path.is_symlink():
            raise
        path.rmdir()


def is_key(path: Path) -> bool:
    """Tell whether a path is the folder of a key, and no link to one."""
    return bool(KEY.fullmatch(path.name)) and not path.is_symlink() and path.is_dir()


def remove_older(folder: Path, turns: float, parts: float) -> int:
    """Remove what a folder has had since before a time; return how many.

    Args:
        folder: of a key, or of the store.
        turns: Unix time; turns from before it are removed.
        parts: the same for what a crash has left.
    """
    count = 0
    try:
        files = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return 0  # another server has removed it
    except OSError as error:
        logger.warning("%s is not swept: %s", folder.name, error.strerror)
        return 0
    for file in files:
        is_turn = TURN.fullmatch(file.name)
        if is_turn or file.name.startswith(PART):
            try:
                if file.lstat().st_mtime < (turns if is_turn else parts):
                    remove(file)
                    count += 1
            except FileNotFoundError:
                pass  # another server was quicker
            except OSError as error:
                logger.warning("%s is not removed: %s", file.name, error.strerror)
    return count
