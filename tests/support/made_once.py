"""Folders that tests share, made once for a whole run by the first test that asks for one."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest


class MadeOnce:
    """Folders made when first asked for; tests read them and change nothing in them.

    Args:
        root: a folder that all of xdist's workers share.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the folder `name`; the first that asks for it makes it."""
        folder = self.root / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                work = folder.with_name(f"part-{folder.name}".replace(".", "-"))
                make(work)
                work.rename(folder)
        return folder


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """Return the path of a folder that all of xdist's workers share."""
    base = factory.getbasetemp()
    return (base.parent if base.name.startswith("popen-") else base) / name
