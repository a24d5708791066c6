"""A store in a folder, which machines may share by NFS."""

from __future__ import annotations

import errno
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
from lminf_export.errors import InputError, ParkingError
from lminf_export.runtime.parking.objects import KEY, TURN, StaleTurnError, Stored, turn_name

logger = logging.getLogger(__name__)

_PART = ".part-"
# Tells the store from an empty folder that stands in its place, such as the mount point under it.
_MARK = ".lminf-store"
_IS_MARK = re.compile(rb"[0-9a-f]{32}\n?")
_TRIES = 100
# What a crash has left is nobody's after that.
_PART_SECONDS = 3600.0
# Others do not get the file, and a link that somebody has put there is not followed.
_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW
# Nor is a pipe waited for.
_READING = os.O_RDONLY | os.O_NONBLOCK | _SAFELY


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
            self._mark = self._marked()
        except FileExistsError:
            raise InputError(f"session store {path}: expected a folder, found a file") from None
        except OSError as error:
            raise InputError(f"session store {path}: {error.strerror or error}") from None

    def turns(self, key: str) -> list[Stored]:
        """Return what there is of a key, in order; what is no file counts as an empty one."""
        found = []
        with self._named("read"):
            try:
                folder = os.open(self._folder(key), os.O_RDONLY | os.O_DIRECTORY | _SAFELY)
            except FileNotFoundError:
                self._require_place()
                return []
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        with suppress(FileNotFoundError):  # removed meanwhile
                            if TURN.fullmatch(entry.name):
                                found.append(Stored(int(entry.name), _size(entry)))
            finally:
                os.close(folder)
            if not found:
                self._require_place()
        return sorted(found)

    def read(self, key: str, found: Stored) -> bytes | None:
        """Return an object's bytes, one more than it had at most; None if it is gone."""
        with self._named("read"):
            try:
                return _content(self._file(key, found.turn), found.nbytes + 1)
            except FileNotFoundError:
                return None

    def create(self, key: str, turn: int, content: bytes) -> None:
        """Create a file, which is on the disk when this returns.

        Raises:
            StaleTurnError: there is one.
        """
        folder = self._folder(key)
        part = folder / (_PART + secrets.token_hex(8))
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
            sync(folder)

    def remove(self, key: str, turn: int) -> None:
        """Remove a file that may be gone already, and the key's folder with the last one."""
        with self._named("removed"):
            _remove(self._file(key, turn))
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
            folders = [path for path in self._path.glob("[0-9a-f][0-9a-f]/*") if _is_key(path)]
            for folder in folders:
                count += _remove_older(folder, due, parts_due)
                with suppress(OSError):  # it holds a later turn, or is gone
                    folder.rmdir()
            return count + _remove_older(self._path, -math.inf, parts_due)

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
                found = _content(mark, 64)
                if _IS_MARK.fullmatch(found):
                    return found
                raise InputError(
                    f"session store {self._path}: its {_MARK} is damaged; remove it if this is "
                    "the store"
                )
            part = self._path / (_PART + secrets.token_hex(8))
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFELY, 0o600)
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
            if _content(self._path / _MARK, 64) == self._mark:
                return
        raise OSError(
            "it is not the one that was opened; mount it again, or start the servers anew if it "
            "was removed on purpose"
        )

    def _created(self, folder: Path, part: Path) -> int:
        """Return a new file in a folder that another may be removing."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFELY
        for _ in range(_TRIES):
            is_new = not folder.exists()
            folder.parent.mkdir(mode=0o700, exist_ok=True)
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


def _size(entry: os.DirEntry[str]) -> int:
    return entry.stat().st_size if entry.is_file(follow_symlinks=False) else 0


def _content(path: Path, most: int) -> bytes:
    """Return a file's first bytes; none of what is no file.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    try:
        handle = os.open(path, _READING)
    except OSError as error:
        if error.errno == errno.ENXIO or path.is_symlink():  # a socket, or a link
            return b""
        raise
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return b""
        with open(handle, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Remove a file that may be gone already, or what somebody has put in its place."""
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):
        if not path.is_dir() or path.is_symlink():
            raise
        path.rmdir()


def _is_key(path: Path) -> bool:
    return bool(KEY.fullmatch(path.name)) and not path.is_symlink() and path.is_dir()


def _remove_older(folder: Path, turns: float, parts: float) -> int:
    """Remove what a folder has had since before a time; return how many.

    Args:
        folder: of a key, or of the store.
        turns: Unix time; turns from before it are removed.
        parts: the same for what a crash has left.
    """
    count = 0
    try:
        files = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return 0  # another server has removed it
    except OSError as error:
        logger.warning("%s is not swept: %s", folder.name, error.strerror)
        return 0
    for file in files:
        is_turn = TURN.fullmatch(file.name)
        if is_turn or file.name.startswith(_PART):
            try:
                if file.lstat().st_mtime < (turns if is_turn else parts):
                    _remove(file)
                    count += 1
            except FileNotFoundError:
                pass  # another server was quicker
            except OSError as error:
                logger.warning("%s is not removed: %s", file.name, error.strerror)
    return count
