"""Whether a file of a folder is really there, or a link that leads out of it."""

from __future__ import annotations

from pathlib import Path


def stays_inside(path: Path, folder: Path) -> bool:
    """Return whether a file, links followed, lies in the folder it is named in.

    The cache of the Hugging Face hub counts as one place: a file of `snapshots/REVISION` that is
    a link into `blobs` beside `snapshots` is inside.

    Args:
        path: the file, named in `folder`; it exists.
        folder: of a model or a bundle; it may itself be reached by a link.

    Raises:
        OSError: the file is not there.
    """
    real, home = path.resolve(strict=True), folder.resolve(strict=True)
    if real.is_relative_to(home):
        return True
    # The folder `blobs` itself must be no link: nothing else of it is resolved.
    return home.parent.name == "snapshots" and real.parent == home.parents[1] / "blobs"
