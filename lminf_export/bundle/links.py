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
    return real.is_relative_to(home) or _is_blob_of(real, home)


def followed(path: Path) -> Path:
    """Return what a link that a user named leads to; any other path as it is.

    A link of the hub's cache stays: what belongs to the file is beside the link, not in `blobs`.
    """
    while path.is_symlink():
        if _is_blob_of(path.resolve(), path.parent.resolve()):
            return path
        path = path.parent / path.readlink()
    return path


def _is_blob_of(real: Path, home: Path) -> bool:
    """Whether a path without links is in the `blobs` of the hub's cache that a folder is in."""
    # The folder `blobs` itself must be no link: nothing else of it is resolved.
    return any(
        revision.parent.name == "snapshots" and real.parent == revision.parents[1] / "blobs"
        for revision in (home, *home.parents)
        if len(revision.parents) > 1
    )
