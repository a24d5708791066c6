"""Files and names that a user brings, read within bounds: nothing here trusts what it finds."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from lminf_export.errors import LminfError, shortened, shown

# Beyond every index and configuration in use (some megabytes, depth 6), and soon read.
_MOST_JSON_BYTES = 2**27
_MOST_DEPTH = 32


def user_path(path: str | Path, error: type[LminfError]) -> Path:
    """Return a path as a user wrote it, with "~" for a home folder.

    Raises:
        LminfError: of the type asked for: no text at all, or "~name" of a user that is not there.
    """
    if path == "":
        raise error("'': an empty path; expected the name of a file or folder")
    try:
        return Path(path).expanduser()
    except RuntimeError as problem:
        raise error(f"{shortened(repr(str(path)))}: {problem}") from problem


def require_path(name: str, value: object, error: type[LminfError]) -> None:
    """Check that a value is a path: text, or an object that stands for one.

    Raises:
        LminfError: of the type asked for: another type.
    """
    if not isinstance(value, str | PurePath):
        raise error(f"{name}={shown(value)}: must be a path (str or Path)")


def is_file(path: Path) -> bool:
    """Whether there is a file; False too for a name that no file system takes."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, not to be searched, or with a null character
        return False


def is_dir(path: Path) -> bool:
    """Whether there is a folder; False too for a name that no file system takes."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def exists(path: Path) -> bool:
    """Whether there is something of that name; False too for one that no file system takes."""
    return is_file(path) or is_dir(path)


def onnx_files(folder: Path) -> list[Path]:
    """Return the ONNX graphs of a folder, ascending; those in its `onnx/` where it has none.

    The letters of ".onnx" may be of either case.
    """
    for place in (folder, folder / "onnx"):
        found = sorted(p for p in place.glob("*") if p.suffix.lower() == ".onnx" and is_file(p))
        if found:
            return found
    return []


def read_json(path: Path, error: type[LminfError], what: str, remedy: str = "") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        error: raised for whatever is wrong with it.
        what: the file's name for messages.
        remedy: what to do, for messages.

    Raises:
        LminfError: of the type asked for: unreadable, not JSON, or beyond 128 MiB or 32 levels.
    """
    then = f"; {remedy}" if remedy else ""
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= _MOST_JSON_BYTES else None
    except OSError as problem:
        raise error(f"{what} cannot be read: {problem.strerror}{then}") from problem
    if content is None:
        raise error(f"{what} has {size} bytes, at most {_MOST_JSON_BYTES} are read{then}")
    try:
        return parse_json(content)
    except ValueError as problem:
        raise error(f"{what} is not valid JSON: {shortened(str(problem), 90)}{then}") from problem


def parse_json(content: bytes | str) -> Any:
    """Parse JSON of at most 32 levels.

    Raises:
        ValueError: it is no JSON in UTF-8, or nested deeper.
    """
    try:
        parsed = json.loads(content)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_MOST_DEPTH} levels") from None
    level = [parsed]
    for _ in range(_MOST_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return parsed
    raise ValueError(f"it is nested deeper than {_MOST_DEPTH} levels")
