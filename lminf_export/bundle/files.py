"""Hashes and sizes of files, and when they are really on the disk."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path

from lminf_export.errors import LminfError

HASH_BLOCK = 2**20

# Called with a file's name and the bytes just read of it.
HashProgress = Callable[[str, int], None]


def file_sha256(path: Path, progress: HashProgress | None = None) -> str:
    """Return a file's SHA-256 in hexadecimal, reading it block by block."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
            if progress:
                progress(path.name, len(block))
    return digest.hexdigest()


def require_utf8(path: Path, error: type[LminfError]) -> None:
    """Check that a path's bytes are UTF-8, as the libraries that read models and graphs need it.

    Raises:
        LminfError: of the given type, if they are not.
    """
    try:
        os.fsencode(path.absolute()).decode("utf-8")
    except UnicodeError as problem:
        shown = str(path).encode("utf-8", "backslashreplace").decode()
        if isinstance(problem, UnicodeDecodeError):
            shown = bytes(problem.object).decode("utf-8", "backslashreplace")
        raise error(
            f"the path {shown} is not UTF-8, which safetensors and onnxruntime need; rename it"
        ) from None


def human_bytes(count: float) -> str:
    """Return a size in binary units, such as "1.5 GiB"."""
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log(count, 1024)), 5)
    return f"{count / 1024**power:.1f} {'KMGTP'[power - 1]}iB"


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
