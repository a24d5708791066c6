"""Which kind of store a name stands for."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lminf_export.disk import user_path
from lminf_export.errors import InputError, shown
from lminf_export.runtime.parking.file_system_objects import FileSystemObjects
from lminf_export.runtime.parking.folder_objects import FolderObjects
from lminf_export.runtime.parking.objects import Objects

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.ASCII | re.DOTALL)
# What is meant as one: another case, one slash, or one inside another.
_ALMOST_URL = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*:(:|/)|(s3a?|gs|gcs|az|abfss?|memory|file|https?):", re.ASCII
)


def open_objects(url: str | Path) -> Objects:
    """Open a store.

    Args:
        url: a folder, which is made if need be; or what fsspec opens, such as s3://BUCKET/PREFIX.

    Raises:
        InputError: it is neither, or the folder cannot be used.
        ParkingError: the store cannot be reached, or its package is not installed.
    """
    text = os.fspath(url) if isinstance(url, str | Path) else None
    if not text or not text.isprintable():
        raise InputError(
            f"session store {shown(url)}: expected a folder, or a URL such as s3://BUCKET/PREFIX"
        )
    found = _URL.fullmatch(text)
    if found is None and _ALMOST_URL.match(text):
        raise InputError(
            f"session store {shown(text)}: no URL of a store, and no folder; expected one such as "
            "s3://BUCKET/PREFIX, or /PATH/OF/FOLDER"
        )
    if found is None:
        return FolderObjects(user_path(text, InputError))
    if found[1] in ("file", "local"):
        if not Path(found[2]).is_absolute():
            raise InputError(f"session store {shown(text)}: expected an absolute path behind it")
        return FolderObjects(Path(found[2]))
    return FileSystemObjects(text)
