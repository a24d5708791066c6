"""A store in a folder, which machines may share by NFS."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lminf_export.bundle.files import sync
from lminf_export.errors import InputError, ParkingError
from lminf_export.runtime.parking.objects import KEY, TURN, StaleTurnError, Stored, turn_name

_PART = ".part-"
_TRIES = 100
# Others do not get the file, and a link that somebody has put there is not followed.
_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW


class FolderObjects:
    """Objects as files of a folder, which machines may share by NFS: one folder for each key.

    Args:
        path: made if it is not there; what is made is its owner's only.

    Raises:
        InputError: the folder cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._try_links()
        except OSError as error:
            raise InputError(f"session store {path}: {error.strerror or error}") from None

    def turns(self, key: str) -> list[Stored]:
        """Return what there is of a key, in order."""
        found = []
        with self._named("read"):
            try:
                entries = list(os.scandir(self._folder(key)))
            except FileNotFoundError:
                return []
            for entry in entries:
                with suppress(FileNotFoundError):  # removed meanwhile
                    if TURN.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        found.append(Stored(int(entry.name), entry.stat().st_size))
        return sorted(found)

    def read(self, key: str, found: Stored) -> bytes | None:
        """Return an object's bytes, one more than it had at most; None if it is gone."""
        with self._named("read"):
            try:
                handle = os.open(self._file(key, found.turn), os.O_RDONLY | _SAFELY)
            except FileNotFoundError:
                return None
            with open(handle, "rb") as file:
                return file.read(found.nbytes + 1)

    def create(self, key: str, turn: int, content: bytes) -> None:
        """Create a file, which is on the disk when this returns.

        Raises:
            StaleTurnError: there is one.
        """
        folder = self._folder(key)
        part = folder / (_PART + secrets.token_hex(8))
        with self._named("written"):
            handle = self._created(folder, part)
            try:
                with open(handle, "wb", buffering=0) as file:
                    rest = memoryview(content)
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(handle)
                # Unlike a rename, a link replaces nothing.
                os.link(part, self._file(key, turn))
            except FileExistsError:
                raise StaleTurnError(f"turn {turn} is there already") from None
            finally:
                with suppress(OSError):  # the sweep takes what stays
                    part.unlink()
            sync(folder)

    def remove(self, key: str, turn: int) -> None:
        """Remove a file that may be gone already, and the key's folder with the last one."""
        with self._named("removed"):
            self._file(key, turn).unlink(missing_ok=True)
            with suppress(OSError):  # it holds another turn, or is gone
                self._folder(key).rmdir()

    def remove_older(self, seconds: float, now: float) -> int:
        """Remove files that were created longer ago, and what a crash has left; return how many."""
        count = 0
        with self._named("swept"):
            for folder in self._path.glob("[0-9a-f][0-9a-f]/*/"):
                if not KEY.fullmatch(folder.name):
                    continue
                for file in _files(folder):
                    if not TURN.fullmatch(file.name) and not file.name.startswith(_PART):
                        continue
                    with suppress(FileNotFoundError):
                        if now - file.lstat().st_mtime > seconds:
                            file.unlink()
                            count += 1
                with suppress(OSError):
                    folder.rmdir()
        return count

    def _created(self, folder: Path, part: Path) -> int:
        """Return a new file in a folder that another may be removing."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFELY
        for _ in range(_TRIES):
            is_new = not folder.exists()
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            if is_new:
                sync(folder.parent)
                sync(self._path)
            with suppress(FileNotFoundError):
                return os.open(part, flags, 0o600)
        raise OSError(f"its folder {folder.name[:12]}… is removed again and again")

    def _try_links(self) -> None:
        """Refuse a file system in which a file cannot get its name in one step.

        Raises:
            InputError, OSError: it has no hard links, or nothing can be written.
        """
        part = self._path / (_PART + secrets.token_hex(8))
        other = part.with_name(part.name + "-link")
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFELY, 0o600))
        try:
            os.link(part, other)
            other.unlink()
        except OSError as error:
            raise InputError(
                f"session store {self._path}: its file system has no hard links "
                f"({error.strerror}); name the store by its URL, such as gs://BUCKET/PREFIX"
            ) from None
        finally:
            part.unlink()

    @contextmanager
    def _named(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise ParkingError(f"session store {self._path} cannot be {done}: {reason}") from None

    def _folder(self, key: str) -> Path:
        return self._path / key[:2] / key

    def _file(self, key: str, turn: int) -> Path:
        return self._folder(key) / turn_name(turn)


def _files(folder: Path) -> list[Path]:
    """Return what is in a folder; nothing if another server has removed it."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
