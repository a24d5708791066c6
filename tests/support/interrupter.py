"""Raises KeyboardInterrupt at a chosen line of the package, to try every moment of a call."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import lminf_export

PACKAGE = str(Path(lminf_export.__file__).parent)


class Interrupter:
    """A context that raises KeyboardInterrupt at the n-th line that this thread runs in a folder.

    Not at the line of a `with` over a lock: it is also that of its end, which no interrupt divides.

    Args:
        at: the line's number, from 1; None only counts lines.
        folder: of the files whose lines count; the package's by default.

    Attributes:
        lines: that have run.
    """

    def __init__(self, at: int | None = None, folder: str = PACKAGE) -> None:
        self.at, self.lines = at, 0
        self._folder = folder

    @property
    def has_come(self) -> bool:
        """Whether there was such a line."""
        return self.at is not None and self.lines >= self.at

    def __enter__(self) -> Interrupter:
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind: object, *_: object) -> bool:
        sys.settrace(None)
        return kind is KeyboardInterrupt

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        path = frame.f_code.co_filename
        if not path.startswith(self._folder):
            return None
        if event == "line" and linecache.getline(path, frame.f_lineno).strip() != _LOCKED:
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self._trace


_LOCKED = "with self._lock:"
