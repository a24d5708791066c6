"""The callback through which long steps report how far they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Called as work goes on; the command line draws a bar, a library caller may log."""

    def __call__(self, phase: str, fraction: float | None) -> None:
        """Say which phase runs, and how much of it is done: 0 … 1, or None where unknown."""
        ...


def silent(phase: str, fraction: float | None) -> None:
    """Ignore the progress."""


def byte_counter(progress: Progress, phase: str, total: int) -> Callable[[int], None]:
    """Return a function that adds moved bytes to a phase of known size and reports the share."""
    done = 0

    def count(moved: int) -> None:
        nonlocal done
        done += moved
        progress(phase, min(done / max(total, 1), 1.0))

    return count
