"""A store in a folder, which machines may share by NFS."""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lminf_export.bundle.files import sync
from lminf_export.errors import InputError, ParkingError, StaleTurnError
from lminf_export.runtime.parking.folder_files import (
    PART,
    SAFELY,
    content_of,
    is_key,
    remove,
    remove_older,
    size,
)
from lminf_export.runtime.parking.objects import TURN, Stored, turn_name

logger = logging.getLogger(__name__)

# Tells the store from an empty folder that stands in its place, such as the mount point under it.
_MARK = ".lminf-store"
_IS_MARK = re.compile(rb"[0-9a-f]{32}\n?")
_TRIES = 100
# What a crash has left is nobody's after that.
_PART_SECONDS = 3600.0
# What a key has whose folder is none, but a file or a link to another.
_NO_FOLDER = Stored(1, 0)


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
            if path.stat().st_mode & stat.S_IWOTH:
                logger.warning(
                    "session store %s: every user of this machine may write there, and so remove "
                    "sessions; chmod o-w it",
                    path,
                )
            self._try_links()
            self._mark = self._marked()
        except FileExistsError:
            raise InputError(f"session store {path}: expected a folder, found a file") from None
        except OSError as error:
            raise InputError(f"session store {path}: {error.strerror or error}") from None

    def turns(self, key: str) -> list[Stored]:
        """Return what there is of a key, in order; what is no file counts as an empty one.

        So does what stands in the place of the key's folder, as if it were its first turn.
        """
        found = []
        with self._named("read"):
            try:
                folder = os.open(self._folder(key), os.O_RDONLY | os.O_DIRECTORY | SAFELY)
            except FileNotFoundError:
                self._require_place()
                return []
            except NotADirectoryError:
                self._require_place()
                if not os.path.lexists(self._folder(key)):
                    raise  # the folder above it is none
                return [_NO_FOLDER]
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        with suppress(FileNotFoundError):  # removed meanwhile
                            if TURN.fullmatch(entry.name):
                                found.append(Stored(int(entry.name), size(entry)))
            finally:
                os.close(folder)
            if not found:
                self._require_place()
        return sorted(found)

    def read(self, key: str, found: Stored) -> bytes | None:
        """Return an object's bytes, one more than it had at most; None if it is gone."""
        with self._named("read"):
            if self._folder(key).is_symlink():
                return b""
            try:
                return content_of(self._file(key, found.turn), found.nbytes + 1)
            except FileNotFoundError:
                return None
            except NotADirectoryError:
                return b""

    def create(self, key: str, turn: int, content: bytes) -> None:
        """Create a file, which is on the disk when this returns.

        Raises:
            StaleTurnError: there is one.
        """
        folder = self._folder(key)
        part = folder / (PART + secrets.token_hex(8))
        with self._named("written"):
            self._require_place()
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
                    folder.rmdir()  # nothing was stored in it
            try:
                sync(folder)
            except FileNotFoundError:
                raise StaleTurnError(f"turn {turn} was removed meanwhile") from None

    def remove(self, key: str, turn: int) -> None:
        """Remove a file that may be gone already, and the key's folder with the last one."""
        with self._named("removed"):
            remove(self._file(key, turn))
            with suppress(OSError):  # it holds another turn, or is gone
                self._folder(key).rmdir()

    def remove_older(self, seconds: float) -> int:
        """Remove files that were created longer ago, and what a crash has left; return how many.

        Time is the file system's, so a server whose clock is wrong removes nothing too early.
        """
        count = 0
        with self._named("swept"):
            self._require_place()
            now = self._time()
            due, parts_due = now - seconds, now - _PART_SECONDS
            folders = [path for path in self._path.glob("[0-9a-f][0-9a-f]/*") if is_key(path)]
            for folder in folders:
                count += remove_older(folder, due, parts_due)
                with suppress(OSError):  # it holds a later turn, or is gone
                    folder.rmdir()
            return count + remove_older(self._path, -math.inf, parts_due)

    def _time(self) -> float:
        """Return what the file system takes for now; a full one has room for that."""
        mark = self._path / _MARK
        os.utime(mark)
        return mark.stat().st_mtime

    def _marked(self) -> bytes:
        """Return the store's mark, which is made if it has none.

        Raises:
            InputError, OSError: what has its name is none; nothing can be written.
        """
        mark = self._path / _MARK
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):
                found = content_of(mark, 64)
                if _IS_MARK.fullmatch(found):
                    return found
                raise InputError(
                    f"session store {self._path}: its {_MARK} is damaged; remove it if this is "
                    "the store"
                )
            part = self._path / (PART + secrets.token_hex(8))
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFELY, 0o600)
            try:
                with open(handle, "wb") as file:
                    file.write(secrets.token_hex(16).encode("ascii") + b"\n")
                    file.flush()
                    os.fsync(handle)
                with suppress(FileExistsError):  # another server's
                    os.link(part, mark)
            finally:
                part.unlink()
            sync(self._path)
        raise OSError(f"its {_MARK} is removed again and again")

    def _require_place(self) -> None:
        """Refuse an empty folder that stands in the store's place: nothing of it is true.

        Raises:
            OSError: the store was unmounted, moved or removed.
        """
        with suppress(FileNotFoundError, NotADirectoryError):
            if content_of(self._path / _MARK, 64) == self._mark:
                return
        raise OSError(
            "it is not the one that was opened; mount it again, or start the servers anew if it "
            "was removed on purpose"
        )

    def _created(self, folder: Path, part: Path) -> int:
        """Return a new file in a folder that another may be removing."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFELY
        for _ in range(_TRIES):
            with suppress(FileNotFoundError, FileExistsError, IsADirectoryError):
                is_new = not os.path.lexists(folder)
                if not is_new and not stat.S_ISDIR(folder.lstat().st_mode):
                    folder.unlink()  # nobody's, and in the way
                    is_new = True
                folder.parent.mkdir(mode=0o700, exist_ok=True)
                folder.mkdir(mode=0o700, exist_ok=True)
                if is_new:
                    sync(folder.parent)
                    sync(self._path)
                return os.open(part, flags, 0o600)
        raise OSError(f"its folder {folder.name[:12]}… is removed again and again")

    def _try_links(self) -> None:
        """Refuse a file system in which a file cannot get its name in one step.

        Raises:
            InputError, OSError: it has no hard links, or nothing can be written.
        """
        part = self._path / (PART + secrets.token_hex(8))
        other = part.with_name(part.name + "-link")
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFELY, 0o600))
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
