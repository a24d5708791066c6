"""The licence of a model goes with its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from lminf_export.bundle.license import LICENSE_FILE, MAX_FILE_BYTES, License, read_license
from lminf_export.bundle.links import stays_inside
from lminf_export.bundle.writer import BundleWriter


def copy_license_files(folder: Path, writer: BundleWriter) -> License | None:
    """Copy the files of a model's licence into its bundle.

    Returns:
        The licence that the model's own card names, if it names one; its text is not copied.
    """
    for path in sorted(folder.iterdir()):
        if (
            LICENSE_FILE.fullmatch(path.name)
            and path.is_file()
            and path.stat().st_size <= MAX_FILE_BYTES
            and stays_inside(path, folder)
        ):
            shutil.copyfile(path, writer.add(path.name, "other"))
    return read_license(folder / "README.md")
