"""Conversations as files, so that a restarted server goes on with them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import stat
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lminf_export.errors import (
    InputError,
    LminfError,
    ParkedSessionError,
    ParkingError,
    SessionError,
)
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.parking.age import DEFAULT_MAX_AGE, SWEPT_AT, is_young, require_young
from lminf_export.runtime.parking.folder_files import content_of, remove
from lminf_export.serve.session_record import (
    conversation_of,
    damaged,
    record_of,
    require_record,
)
from lminf_export.serve.state_store import Conversation

logger = logging.getLogger(__name__)

_STATE, _RECORD, _PART, _LOCK = ".state", ".json", ".part", ".lock"
# Nothing else in a folder is read or removed: it may be one of other things, by mistake.
_IS_RECORD = re.compile(r"[0-9a-f]{64}\.json")
_IS_STATE = re.compile(r"([0-9a-f]{64})-[0-9a-f]{8}\.state")
# The third is what a snapshot is written to before it has its name.
_IS_OURS = re.compile(
    rf"(?:{_IS_RECORD.pattern}|{_IS_STATE.pattern})(?:\.part)?|\.state-\w+|\.lock", re.ASCII
)
# Other programs do not get the file, and a link that somebody has put there is not followed.
_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW
_MAX_RECORD = 2**20


@dataclass(frozen=True)
class _File:
    """A conversation's files.

    Attributes:
        state: name; "" where the record names none that could be its state.
        nbytes: of the state.
        changed: Unix time.
    """

    state: str
    nbytes: int
    changed: float


class SessionFolder:
    """A folder of conversations: for each a state and a record that vouches for it.

    A record is written, by a rename, when its state is complete. File names are hashes. Only one
    server at a time uses a folder. What is damaged, another bundle's or too old stays and is
    refused, until it is deleted or makes room for others. Safe in any thread.

    Args:
        path: made if it is not there; nobody else may read it, unless it holds other files.
        max_bytes: of all files; the oldest are dropped.
        max_age: seconds after which a conversation is not resumed any more.

    Raises:
        InputError: the folder cannot be used, or another server uses it.
    """

    is_shared = False
    threads = 1

    def __init__(self, path: Path, max_bytes: int, max_age: float = DEFAULT_MAX_AGE) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._lock = threading.Lock()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.geteuid() not in (0, path.stat().st_uid):
                raise InputError(f"--session-folder {path} belongs to another user; take your own")
            if all(map(_IS_OURS.fullmatch, os.listdir(path))):
                path.chmod(0o700)
            self._guard = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | _SAFELY, 0o600)
        except OSError as error:
            raise InputError(f"--session-folder {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._guard)
            raise InputError(
                f"--session-folder {path} is used by another server; give each its own"
            ) from None
        # Files that could not be removed: nothing goes on from them, and removing is tried again.
        self._left: dict[str, _File] = {}
        try:
            self._files = self._found()
        except OSError as error:
            os.close(self._guard)
            raise InputError(f"--session-folder {path}: {error.strerror}") from None
        self._make_room()

    def close(self) -> None:
        """Let another server use the folder."""
        os.close(self._guard)

    def counts(self) -> tuple[int, int]:
        """Return how many conversations there are, and their bytes."""
        with self._lock:
            return len(self._files), sum(file.nbytes for file in self._files.values())

    def latest(self, key: str) -> int:
        """Return 0: nobody else writes here."""
        return 0

    def is_latest(self, key: str, conversation: Conversation) -> bool:
        """Tell whether a conversation in memory is not too old; nobody else writes here."""
        return is_young(conversation.written, self._max_age)

    def save(self, key: str, conversation: Conversation) -> bool:
        """Write a conversation; tell whether the folder has room for it.

        Raises:
            OSError, LminfError: it could not be written, or not surely. What stood there, an
                earlier turn, is removed: better none than a past without the latest.
        """
        try:
            return self._save(key, conversation)
        except BaseException:
            self.forget(key)
            raise

    def _save(self, key: str, conversation: Conversation) -> bool:
        state = f"{key}-{secrets.token_hex(4)}{_STATE}"
        part = self._path / (state + _PART)
        try:
            conversation.kept.snapshot.save(part)
            part.chmod(0o600)
            digest, size = _digest(part)
            if size > self._max_bytes:
                part.unlink()
                self.forget(key)  # what stands there is an earlier turn
                return False
            part.rename(self._path / state)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        record = {
            **record_of(conversation),
            "state": state,
            "sha256": digest,
            "bytes": size,
        }
        try:
            self._write_record(key, record)
        except BaseException:
            (self._path / state).unlink(missing_ok=True)
            raise
        changed = (self._path / (key + _RECORD)).stat().st_mtime
        with self._lock:
            old = self._files.pop(key, None) or self._left.pop(key, None)
            self._files[key] = _File(state, size, changed)
            if old is not None and old.state:
                # What no record names is removed by the next server at the latest.
                with suppress(OSError):
                    (self._path / old.state).unlink()
            self._make_room()
            is_kept = key in self._files
        self._sync()
        return is_kept

    def load(self, key: str, lm: LanguageModel) -> Conversation | None:
        """Return a conversation; None if there is none.

        Raises:
            ParkedSessionError: its files are damaged, another bundle's, or too old.
            ParkingError: they cannot be read.
        """
        while (file := self._file(key)) is not None:
            try:
                require_young(file.changed, self._max_age)
                conversation = self._read(key, _record(self._path / (key + _RECORD)), lm)
            except (OSError, ValueError, LminfError) as error:
                if self._file(key) is not file:
                    continue  # it was deleted meanwhile, or has a later turn
                if isinstance(error, ParkedSessionError):
                    raise
                if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                    raise ParkingError(f"a kept conversation: {error.strerror}") from None
                raise damaged(str(error)) from None
            return replace(conversation, written=file.changed)
        return None

    def _file(self, key: str) -> _File | None:
        with self._lock:
            return self._files.get(key)

    def drop(self, key: str) -> bool:
        """Remove a conversation; tell whether there was one.

        Raises:
            OSError: its files could not be removed; only another server would find them.
        """
        with self._lock:
            return self._remove(key)

    def forget(self, key: str) -> None:
        """Remove a conversation; where that fails, the log says so."""
        with self._lock:
            self._forget(key)

    def _read(self, key: str, record: Any, lm: LanguageModel) -> Conversation:
        require_record(record, lm.bundle.manifest)
        name = _state_of(key, record)
        _size(self._path / name)
        if _digest(self._path / name) != (record.get("sha256"), record.get("bytes")):
            raise damaged("its state is not the one that was recorded")
        try:
            snapshot = lm.load_snapshot(self._path / name)
        except SessionError as error:  # and as it was recorded
            raise ParkedSessionError("foreign", str(error)) from None
        return conversation_of(record, snapshot)

    def _write_record(self, key: str, record: dict[str, Any]) -> None:
        part = self._path / (key + _RECORD + _PART)
        try:
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _SAFELY, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as file:
                json.dump(record, file)
                file.flush()
                os.fsync(file.fileno())
            part.rename(self._path / (key + _RECORD))
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _sync(self) -> None:
        """Have the names of the files on the disk, as their content is."""
        folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | _SAFELY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _found(self) -> dict[str, _File]:
        """Return the files of an earlier server, oldest first; remove what it left unfinished."""
        files = {}
        ours = [path for path in self._path.iterdir() if _IS_OURS.fullmatch(path.name)]
        for path in ours:
            if not _IS_RECORD.fullmatch(path.name):
                continue
            try:
                record = _record(path)
                name, nbytes = _state_of(path.stem, record), record.get("bytes")
                if nbytes != _size(self._path / name):
                    raise ValueError("its state is missing or of another size")
                files[path.stem] = _File(name, nbytes, path.lstat().st_mtime)
            except (OSError, ValueError, LminfError) as error:
                logger.warning("a kept conversation cannot be resumed: %s", error)
                files[path.stem] = _File("", 0, path.lstat().st_mtime)
        known = {file.state for file in files.values()}
        for path in ours:
            if path.name not in known and not path.name.endswith((_RECORD, _LOCK)):
                _remove_unless_full(path)
        return dict(sorted(files.items(), key=lambda item: item[1].changed))

    def _make_room(self) -> None:
        """Remove the oldest conversations that have no room, or have long been too old."""
        total = sum(file.nbytes for file in self._files.values())
        for key, file in list(self._files.items()):
            if total <= self._max_bytes and is_young(file.changed, SWEPT_AT * self._max_age):
                return
            total -= file.nbytes
            self._forget(key)

    def _forget(self, key: str) -> None:
        try:
            self._remove(key)
        except OSError as error:
            logger.warning(
                "an earlier turn of a conversation could not be removed, and would be found after "
                "a restart: %s",
                error,
            )

    def _remove(self, key: str) -> bool:
        file = self._files.pop(key, None) or self._left.pop(key, None)
        if file is None:
            return False
        try:
            remove(self._path / (key + _RECORD))
            if file.state:
                remove(self._path / file.state)
        except OSError:
            self._left[key] = file
            raise
        return True


def _record(path: Path) -> Any:
    """Return what a record holds.

    Raises:
        OSError, ValueError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(content_of(path, _MAX_RECORD))
    except RecursionError:
        raise ValueError("its record nests too deeply") from None


def _state_of(key: str, record: Any) -> str:
    """Return the name of the file of a conversation's state.

    Raises:
        InputError: the record names none, or another conversation's.
    """
    name = record.get("state") if isinstance(record, dict) else None
    found = _IS_STATE.fullmatch(name) if isinstance(name, str) else None
    if found is None or found[1] != key:
        raise InputError("its record names no state")
    return found[0]


def _size(path: Path) -> int:
    """Return a file's bytes.

    Raises:
        OSError, ValueError: it is not there, or no file.
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("its state is no file")
    return found.st_size


def _remove_unless_full(path: Path) -> None:
    """Remove a file, or what stands in its place; a folder with files of others stays."""
    try:
        remove(path)
    except OSError as error:
        logger.warning("%s is in the way and cannot be removed: %s", path.name, error.strerror)


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return digest.hexdigest(), file.tell()
