"""Kills a process at every call it makes into the system while it writes a bundle.

Run as a program: it forks one child for each point, which counts calls of C functions (among them
all that touch files) made in the code of bundles and of the standard library, and kills itself
before, or after, the n-th. The parent then looks at what is left. Prints JSON.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from lminf_export.bundle import writer as writer_module
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.writer import BundleWriter
from lminf_export.engine.add_plan import add_plan
from lminf_export.errors import BundleError

# Functions after which nothing on the disk is other than before; a kill there shows nothing new.
_QUIET = {"builtins", "re", "_struct", "_json", "pydantic_core", "_hashlib", "itertools", "_thread"}


def counting_calls(action: Callable[[], object], kill_at: int | None) -> int:
    """Run an action and return how many system-like calls it made; kill this process at one."""
    count = 0

    def watch(frame: object, event: str, function: object) -> None:
        nonlocal count
        if event not in ("c_call", "c_return"):
            return
        module = (
            getattr(function, "__module__", None)
            or type(getattr(function, "__self__", None)).__module__
        )
        if module in _QUIET:
            return
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def at_each_point(
    action: Callable[[Path], object],
    prepare: Callable[[Path], None],
    look: Callable[[Path], str],
    folder: Path,
    points: int,
) -> list[str]:
    """Return what `look` says after a kill at each of so many points, spread over the action.

    Args:
        action: what is killed; takes a folder of its own.
        prepare: fills that folder.
        look: says what is left there.
        folder: an empty one to work in.
        points: how many.
    """
    prepare(folder / "whole")
    total = counting_calls(lambda: action(folder / "whole"), None)
    said = []
    for index in range(points):
        place = folder / str(index)
        prepare(place)
        kill_at = 1 + index * total // (points + 1)
        child = os.fork()
        if child == 0:
            counting_calls(lambda: action(place), kill_at)  # noqa: B023  # used before the next
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            said.append(f"point {kill_at} of {total} was not reached")
        else:
            said.append(look(place))
        shutil.rmtree(place)
    return said


def replace(place: Path) -> None:
    """Write a small bundle over the one that is there."""
    pristine = Bundle.open(sys.argv[2])
    with BundleWriter(place / "b", force=True) as writer:
        for name, entry in pristine.manifest.files.items():
            writer.add(name, entry.role).write_bytes((pristine.path / name).read_bytes())
        writer.commit(pristine.manifest.model_copy(update={"files": {}}))


def after_a_kill(place: Path) -> str:
    """Say what is at the destination, that nothing else loads, and that the next export cleans."""
    target = place / "b"
    for other in place.iterdir():
        if other == target:
            continue
        try:
            Bundle.open(other)
        except BundleError:
            continue
        return f"{other.name} loads"
    try:
        found = Bundle.open(target, "full").manifest.source.name
    except BundleError as error:
        found = str(error)
    replace(place)
    left = sorted(os.listdir(place))
    Bundle.open(target, "full")
    return found if left == ["b"] else f"left behind: {left}"


def add(place: Path) -> None:
    """Replace the plan of the bundle."""
    add_plan(place / "b", place / "new.plan", target="sm_90", force=True)


def after_a_killed_add(place: Path) -> str:
    """Say which plan the bundle has."""
    try:
        opened = Bundle.open(place / "b", "full")
    except BundleError as error:
        return str(error)
    engine = opened.manifest.engine
    found = engine.version if engine else "none"
    add(place)
    hidden = [name for name in os.listdir(place / "b") if name.startswith(".")]
    return f"left behind: {hidden}" if hidden else found


def main(kind: str, first: Path, second: Path, folder: Path, points: int) -> None:
    """Print what is found after each kill, counted."""
    logging.disable()

    def prepare(place: Path) -> None:
        place.mkdir(parents=True)
        shutil.copytree(first, place / "b")
        if kind == "add":
            shutil.copy(second, place / "new.plan")

    action, look = (add, after_a_killed_add) if kind == "add" else (replace, after_a_kill)
    if kind == "two-steps":
        writer_module.exchange = lambda left, right: False
    print(json.dumps(at_each_point(action, prepare, look, folder, points)))


if __name__ == "__main__":
    main(sys.argv[3], Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[4]), int(sys.argv[5]))
