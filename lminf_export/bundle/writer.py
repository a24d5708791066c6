"""Writes a bundle: whole or not at all.

Files go into a hidden folder beside the destination, are hashed and synced, described by
`lminf.json` last, and renamed into place; a bundle that is replaced changes places with the new
one in one step. Whatever interrupts that removes the hidden folder; what a kill -9 leaves behind
has a name under which nothing loads it, and the next export to the same place clears it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from lminf_export.bundle.card import CARD_NAME, model_card
from lminf_export.bundle.destination import (
    NO_SPACE,
    TOKEN_LENGTH,
    check_destination,
    make_parents,
    remove_abandoned,
    remove_folder,
    restore_replaced,
    temporary_folder,
    temporary_name,
    terminated_as_exit,
)
from lminf_export.bundle.exchange import exchange
from lminf_export.bundle.files import HashProgress, file_sha256, human_bytes, sync
from lminf_export.bundle.license import License
from lminf_export.bundle.manifest import Manifest
from lminf_export.bundle.records import MANIFEST_NAME, FileEntry, Role, check_file_name
from lminf_export.bundle.trust import remember
from lminf_export.errors import ExportError

logger = logging.getLogger(__name__)


class BundleWriter:
    """Writes one bundle; use as a context manager and call `commit` at the end of the block.

    Args:
        directory: the bundle's folder; it and its parents may be missing.
        force: replace a bundle that is there already.

    Raises:
        ExportError: on entering, if the destination is taken; within, for a full disk, in
            one line with the numbers. An OSError of another kind passes through.
    """

    def __init__(self, directory: str | Path, *, force: bool = False) -> None:
        self.directory = Path(os.path.abspath(directory))
        self.force = force
        self._temporary = self.directory  # until it is made
        self._roles: dict[str, Role] = {}
        self._digests: dict[str, str] = {}
        self._cleanup = ExitStack()

    def __enter__(self) -> BundleWriter:
        restore_replaced(self.directory)
        check_destination(self.directory, force=self.force)
        with ExitStack() as stack:
            stack.enter_context(terminated_as_exit())
            make_parents(self.directory.parent, stack)
            remove_abandoned(self.directory)
            self._temporary = temporary_folder(self.directory, stack)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        full = isinstance(error, OSError) and error.errno in NO_SPACE
        needed, free = self._bytes_written(), _free_bytes(self._temporary)
        self._cleanup.close()
        if full:
            raise ExportError(
                f"no space left for {self.directory}: {human_bytes(needed)} were written and "
                f"{human_bytes(free)} are free on that disk; free some or choose another --out"
            ) from error

    @property
    def folder(self) -> Path:
        """Where the bundle's files are until `commit`."""
        return self._temporary

    def add(self, name: str, role: Role) -> Path:
        """Announce a file and return the path to write it to.

        Args:
            name: plain relative name, "/" between folders.
            role: what it is for.
        """
        try:
            check_file_name(name)
        except ValueError as error:
            raise ExportError(f"cannot put a file into the bundle: {error}") from None
        self._roles[name] = role
        path = self._temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def set_digest(self, name: str, sha256: str) -> None:
        """Give a file's SHA-256, computed while it was written, for `commit`."""
        self._digests[name] = sha256

    def require_space(self, num_bytes: int) -> None:
        """Raise ExportError now if the disk cannot take num_bytes more bytes."""
        free = _free_bytes(self._temporary)
        if num_bytes > free:
            raise ExportError(
                f"no space for {self.directory}: it needs {human_bytes(num_bytes)}, "
                f"{human_bytes(free)} are free on that disk; free some or choose another --out"
            )

    def commit(
        self,
        draft: Manifest,
        progress: HashProgress | None = None,
        license: License | None = None,
    ) -> Manifest:
        """Hash and sync every file, write card and manifest, and rename the folder into place.

        Args:
            draft: from `new_manifest`; its file table and hash are filled in.
            progress: called with each file's name and the bytes hashed.
            license: of the source model, for the card.

        Returns:
            The sealed manifest; the bundle is at `directory`.
        """
        missing = sorted({draft.graph, *_engine_files(draft)} - self._roles.keys())
        assert not missing, f"the manifest names {missing}, which were never added"
        entries = {name: self._entry(name, progress) for name in sorted(self._roles)}
        if CARD_NAME not in entries:
            card = model_card(draft.model_copy(update={"files": entries}), license)
            self.add(CARD_NAME, "other").write_text(card, encoding="utf-8")
            entries[CARD_NAME] = self._entry(CARD_NAME, progress)
        manifest = draft.sealed(entries)
        self._assert_nothing_else()
        path = self._temporary / MANIFEST_NAME
        path.write_text(manifest.to_json(), encoding="utf-8")
        sync(path)
        for folder in [p for p in self._temporary.rglob("*") if p.is_dir()]:
            sync(folder)
        sync(self._temporary)
        remember(manifest)
        self._move_into_place()
        return manifest

    def _entry(self, name: str, progress: HashProgress | None) -> FileEntry:
        path = self._temporary / name
        if path.is_symlink() or not path.is_file():
            raise ExportError(f"{name} was not written into the bundle as a plain file")
        sync(path)
        size, digest = path.stat().st_size, self._digests.get(name)
        if digest is None:
            digest = file_sha256(path, progress)
        return FileEntry(bytes=size, sha256=digest, role=self._roles[name])

    def _assert_nothing_else(self) -> None:
        found = {p.relative_to(self._temporary).as_posix() for p in _files(self._temporary)}
        assert found == set(self._roles), f"unannounced files: {sorted(found - set(self._roles))}"

    def _move_into_place(self) -> None:
        check_destination(self.directory, force=self.force)
        if not (self.directory.exists() and any(self.directory.iterdir())):
            try:
                os.rename(self._temporary, self.directory)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise ExportError(
                    f"{self.directory} was filled by another process; nothing of it was touched"
                ) from None
        elif not exchange(self._temporary, self.directory):
            self._replace_in_two_steps()
        # Only when the new bundle is on the disk does the old one go.
        sync(self.directory.parent)

    def _replace_in_two_steps(self) -> None:
        """Move the old bundle away and the new one in; `restore_replaced` mends a kill between."""
        token = self._temporary.name[-TOKEN_LENGTH:]
        old = temporary_name(self.directory, "replaced", token)
        os.rename(self.directory, old)
        try:
            os.rename(self._temporary, self.directory)
        except BaseException:
            os.rename(old, self.directory)
            raise
        self._cleanup.callback(remove_folder, old)

    def _bytes_written(self) -> int:
        with contextlib.suppress(OSError):
            return sum(p.stat().st_size for p in _files(self._temporary))
        return 0


def _engine_files(manifest: Manifest) -> list[str]:
    engine, recipe = manifest.engine, manifest.engine_recipe
    names = [recipe.graph] if recipe else []
    if engine:
        names.append(engine.file)
        names += [engine.plugin.file] if engine.plugin else []
    return names


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())


def _free_bytes(path: Path) -> int:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(path).free
    return 0
