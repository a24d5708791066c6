"""Links in a folder that somebody else packed."""

from __future__ import annotations

from pathlib import Path

from lminf_export.bundle.links import stays_inside
from lminf_export.errors import ModelError


def refuse_links_to_outside(folder: Path) -> None:
    """Refuse a model's or an adapter's folder in which something is a link that leaves it.

    Whoever packed the folder chose where the link leads on this machine, and what is read becomes
    part of a bundle. The layout of the hub's cache counts as one place.

    Raises:
        ModelError: naming the file.
    """
    try:
        links = [p for p in sorted(folder.iterdir()) if p.is_symlink() and p.name[0] != "."]
    except OSError as error:
        raise ModelError(f"cannot read model folder {folder.name!r}: {error.strerror}") from None
    outside = next((path for path in links if not stays_inside(path, folder)), None)
    if outside is not None:
        raise ModelError(
            f"{outside.name} in model folder {folder.name!r} is a link to outside of it, which is "
            "not followed; put the file itself there, or name the folder it is in"
        )
