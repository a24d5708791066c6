"""Progress of long steps on stderr: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lminf_export.progress import Progress, silent


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Progress]:
    """Yield a callback that draws phases, each with a bar where its share is known."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield silent
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, int] = {}

        def show(phase: str, fraction: float | None) -> None:
            if phase not in tasks:
                for task in tasks.values():
                    bars.update(task, total=1.0, completed=1.0)  # type: ignore[arg-type]
                    bars.stop_task(task)  # type: ignore[arg-type]
                tasks[phase] = bars.add_task(phase, total=None)
            if fraction is not None:
                bars.update(tasks[phase], total=1.0, completed=fraction)  # type: ignore[arg-type]

        yield show
        for task in tasks.values():
            bars.update(task, total=1.0, completed=1.0)  # type: ignore[arg-type]
