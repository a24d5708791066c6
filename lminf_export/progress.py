"""How long steps tell whoever is watching where they are."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on; the command line draws a bar, a library caller may log."""

    def __call__(self, phase: str, fraction: float | None) -> None:
        """Say which phase runs, and how much of it is done: 0 … 1, or None where unknown."""
        ...


def silent(phase: str, fraction: float | None) -> None:
    """Tell nobody."""
