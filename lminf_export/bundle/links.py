"""Whether a file of a folder is really there, or a link that leads out of it."""

from __future__ import annotations

from pathlib import Path


def stays_inside(path: Path, folder: Path) -> bool:
    """Return whether a path, links followed, leads to a place in the folder it is named in.

    The cache of the Hugging Face hub counts as one place: a file of `snapshots/REVISION` that is
    a link into `blobs` beside `snapshots` is inside.

    Args:
        path: named in `folder`; what it leads to need not exist.
        folder: of a model or a bundle; it may itself be reached by a link.
    """
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False
    if real.is_relative_to(home):
        return True
    # The folder `blobs` itself must be no link: nothing else of it is resolved.
    return any(
        revision.parent.name == "snapshots" and real.parent == revision.parents[1] / "blobs"
        for revision in (home, *home.parents)
        if len(revision.parents) > 1
    )
