"""The model repository that is written to: a new one, or one that gets models beside its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lminf_export.bundle.destination import check_destination, remove_folder
from lminf_export.bundle.files import require_utf8, sync
from lminf_export.disk import user_path
from lminf_export.errors import ExportError, InputError, shown
from lminf_export.triton.readme import add_page

CONFIG = "config.pbtxt"


def checked_repository(out: str | Path) -> Path:
    """Return the place of a repository, where models can be put.

    Raises:
        InputError: no path.
        ExportError: it has other things, or nothing can be put there in one step.
    """
    try:
        target = Path(os.path.abspath(user_path(out, InputError)))
        require_utf8(target, ExportError)
        if not _has_entries(target):
            check_destination(target, force=False)
        elif not has_models(target):
            raise ExportError(
                f"{target} is not empty, and no model repository; nothing was touched: name "
                "another folder"
            )
        elif os.path.ismount(target):
            raise ExportError(
                f"{target} is a mount point, and a model cannot be moved into it in one step; "
                "name a folder inside it"
            )
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror}") from None
    except ValueError as error:  # a null character
        raise ExportError(f"out={shown(str(out))}: {error}") from None
    return target


def has_models(folder: Path) -> bool:
    """Return whether a folder is a repository that has models."""
    return folder.is_dir() and any((path / CONFIG).is_file() for path in folder.iterdir())


def require_new(repository: Path, models: Sequence[str]) -> None:
    """Refuse models that a repository has already.

    Raises:
        ExportError: naming them.
    """
    there = [model for model in models if os.path.lexists(repository / model)]
    if there:
        raise ExportError(
            f"{repository} is not empty: it has {', '.join(there)} already; nothing was touched: "
            "remove it, or give another --name or folder"
        )


def put(partial: Path, repository: Path, models: Sequence[str]) -> None:
    """Put what is written in its place: the repository, or models beside others; all or none.

    Args:
        partial: folder that has the models, and their page.
        repository: on the same disk.
        models: names of folders.

    Raises:
        ExportError: one of the models is there.
        OSError: it fails otherwise.
    """
    if not has_models(repository):
        partial.rename(repository)
        sync(repository.parent)
        return
    require_new(repository, models)  # none came meanwhile
    with ExitStack() as undo:
        for model in models:
            (partial / model).rename(repository / model)
            undo.callback(remove_folder, repository / model)
        add_page(partial, repository)
        sync(repository)
        undo.pop_all()


def _has_entries(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and any(folder.iterdir())
