"""The folder a bundle is written to: checked, made, locked, and cleared of abandoned exports."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

from lminf_export.bundle.records import MANIFEST_NAME
from lminf_export.errors import ExportError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not a POSIX system: folders cannot be locked, abandoned ones stay
    fcntl = None

logger = logging.getLogger(__name__)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def check_destination(directory: Path, *, force: bool) -> None:
    """Raise ExportError if a bundle cannot be put there; an empty folder is as good as none."""
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise ExportError(f"{directory} is a file; name a folder, or remove it")
    if directory.is_symlink():
        raise ExportError(f"{directory} is a link; name the folder it points to")
    if directory == Path.cwd():
        raise ExportError(f"{directory} is the current folder; name a folder inside it")
    if os.path.ismount(directory):
        raise ExportError(
            f"{directory} is a mount point and cannot be replaced in one go; "
            f"name a folder inside it, such as {directory / 'bundle'}"
        )
    if (directory / MANIFEST_NAME).is_file():
        if not force:
            raise ExportError(f"{directory} is a bundle already; --force replaces it")
    elif any(directory.iterdir()):
        raise ExportError(
            f"{directory} exists and is not a bundle; nothing was touched: name another folder"
        )


def make_folder(path: Path) -> None:
    """Make a folder; ExportError if that fails, OSError if the disk is full."""
    try:
        path.mkdir()
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise ExportError(f"cannot write to {path.parent}: {error.strerror}") from None


def make_parents(parent: Path, stack: ExitStack) -> None:
    """Make missing folders; a failed export takes the empty ones away again."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    if not parent.is_dir():
        raise ExportError(f"cannot write to {parent}: it is not a folder")
    for folder in reversed(missing):
        make_folder(folder)
        stack.callback(_remove_if_empty, folder)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def remove_abandoned(directory: Path) -> None:
    """Clear what killed exports to this place left; a running one holds a lock."""
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{re.escape(directory.name)}\.(partial|replaced)-[0-9a-f]{{8}}")
    for path in directory.parent.iterdir():
        if pattern.fullmatch(path.name) is None or not path.is_dir():
            continue
        # A replaced bundle is only spare while the one that replaced it is there.
        if ".replaced-" in path.name and not directory.exists():
            continue
        with contextlib.suppress(OSError), locked(path):
            logger.warning("removing %s, left by an interrupted export", path)
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder; OSError if another process holds it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
