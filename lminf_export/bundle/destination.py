"""The folder a bundle is written to: checked, made, locked, and cleared of abandoned exports."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, ModuleType
from typing import Literal

from lminf_export.bundle.files import require_utf8
from lminf_export.bundle.records import MANIFEST_NAME
from lminf_export.errors import ExportError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not a POSIX system: folders cannot be locked, abandoned ones stay
    fcntl = None

logger = logging.getLogger(__name__)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

# Hexadecimal digits at the end of the name of a hidden folder.
TOKEN_LENGTH = 8
TemporaryKind = Literal["partial", "replaced"]
_TEMPORARY = re.compile(rf"\..+\.(partial|replaced)-[0-9a-f]{{{TOKEN_LENGTH}}}", re.DOTALL)


def check_destination(directory: Path, *, force: bool) -> None:
    """Raise ExportError if a bundle cannot be put there; an empty folder is as good as none."""
    require_utf8(directory, ExportError)
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise ExportError(f"{directory} is a file; name a folder, or remove it")
    if directory.is_symlink():
        raise ExportError(f"{directory} is a link; name the folder it points to")
    if Path.cwd().is_relative_to(directory.resolve()):
        raise ExportError(
            f"{directory} is the current folder, or one around it; name another, or leave it first"
        )
    if os.path.ismount(directory):
        raise ExportError(
            f"{directory} is a mount point and cannot be replaced in one go; "
            f"name a folder inside it, such as {directory / 'bundle'}"
        )
    if _has_manifest(directory):
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


def temporary_name(directory: Path, kind: TemporaryKind, token: str) -> Path:
    """Return the hidden folder beside a destination in which an export works.

    Args:
        directory: the destination.
        kind: "partial" for a bundle that is being written, "replaced" for the one it replaces.
        token: eight hexadecimal digits.
    """
    return directory.with_name(f".{directory.name}.{kind}-{token}")


def temporary_folder(directory: Path, stack: ExitStack) -> Path:
    """Make and lock the folder to write into; a folder without a lock may be cleared by others.

    Args:
        directory: the destination; its parent exists.
        stack: at whose end the folder goes, if it is still there, and its lock.

    Raises:
        ExportError: it cannot be made.
    """
    while True:
        path = temporary_name(directory, "partial", secrets.token_hex(TOKEN_LENGTH // 2))
        make_folder(path)
        try:
            stack.enter_context(locked(path))
        except (BlockingIOError, FileNotFoundError):
            continue  # another export took it for abandoned before it was locked
        except OSError as error:
            logger.info("%s has no lock: %s", path, error.strerror)
        stack.callback(remove_folder, path)
        return path


def is_temporary(folder: Path) -> bool:
    """Return whether a folder has the name of one in which an export works."""
    return _TEMPORARY.fullmatch(folder.name) is not None


def replaced_folders(directory: Path) -> list[Path]:
    """Return whole bundles that an interrupted export had moved away from a destination."""
    return [path for path in _temporaries(directory, "replaced") if _has_manifest(path)]


def restore_replaced(directory: Path) -> None:
    """Put a bundle back that an export had moved away before it was killed.

    Only where the system cannot exchange two folders in one step is there such a moment.
    """
    if os.path.lexists(directory):
        return
    for path in replaced_folders(directory):
        with contextlib.suppress(OSError), locked(path):
            os.rename(path, directory)
            logger.warning("put %s back, which an interrupted export had moved away", directory)
            return


def remove_abandoned(directory: Path) -> None:
    """Clear what killed exports to this place left; a running one holds a lock."""
    if fcntl is None:
        return
    for path in _temporaries(directory):
        # A replaced bundle is only spare while the one that replaced it is there.
        if ".replaced-" in path.name and not directory.exists():
            continue
        with contextlib.suppress(OSError), locked(path):
            logger.warning("removing %s, left by an interrupted export", path)
            remove_folder(path)


def remove_folder(folder: Path) -> None:
    """Remove a bundle's folder, its manifest first: what is left of it at any time is no bundle."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST_NAME).unlink()
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder.

    Raises:
        OSError: another process holds it, the folder has gone, or folders have no locks here.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have removed the folder between the two steps.
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def terminated_as_exit() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that cleaning up happens."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM] + ([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])
    before = {n: signal.signal(n, leave) for n in numbers if signal.getsignal(n) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _temporaries(directory: Path, kind: TemporaryKind | None = None) -> list[Path]:
    """Return the hidden folders of exports to a destination, in order of their names."""
    kinds = kind or "partial|replaced"
    pattern = re.compile(rf"\.{re.escape(directory.name)}\.({kinds})-[0-9a-f]{{{TOKEN_LENGTH}}}")
    try:
        found = [path for path in directory.parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:
        return []
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def _has_manifest(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file()
