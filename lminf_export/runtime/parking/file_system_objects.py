"""A store that fsspec opens: S3, GCS, Azure and others."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, suppress
from secrets import token_hex
from typing import Any
from urllib.parse import urlsplit

from lminf_export.errors import InputError, ParkingError, StaleTurnError, shortened
from lminf_export.runtime.foreign_errors import foreign_errors
from lminf_export.runtime.parking.objects import TURN, Stored, turn_name

# Stores without folders to make.
_BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
# Those whose writes can be told to replace nothing; the last is for tests.
_CONDITIONAL = {*_BUCKETS, "memory"}
# In Azure's URLs a container stands before the sign.
_KEYS = re.compile(
    r"(?!az:|abfss?:)[a-z][a-z0-9+.-]*:/*[^/]*@|(?:az|abfss?)://[^/@]*:[^/]*@",
    re.ASCII | re.IGNORECASE,
)


class FileSystemObjects:
    """Objects in a store that fsspec opens: s3://, gs://, az:// and others.

    Turns are created by conditional writes; whether the store has them is tried at the beginning.
    Old objects are removed by the store's own lifecycle rules.

    Args:
        url: of the store.

    Raises:
        InputError: a kind of store that has no conditional writes, or a URL with keys.
        ParkingError: the store cannot be used, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url
        scheme = url.partition("://")[0]
        if has_keys(url):
            raise InputError(
                f"session store {scheme}://…: keys in a URL are seen by others; give them as the "
                "store's own variables or files"
            )
        if scheme not in _CONDITIONAL:
            raise InputError(
                f"session store {shortened(url)}: {scheme}:// has no writes that replace nothing; "
                f"use a folder, or one of {', '.join(sorted(_CONDITIONAL))}"
            )
        _require_url(url)
        with self._named("opened"):
            # Nothing is cached: other machines write there, too.
            self._files, root = fsspec.core.url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=True
            )
        self._root = str(root).rstrip("/")
        self._require_conditions()

    def turns(self, key: str) -> list[Stored]:
        """Return what there is of a key, in order."""
        with self._named("read"):
            try:
                entries: list[dict[str, Any]] = self._files.ls(self._folder(key), detail=True)
            except FileNotFoundError:
                return []
            names = [(str(entry["name"]).rpartition("/")[2], entry) for entry in entries]
            return sorted(
                Stored(int(name), int(entry["size"]))
                for name, entry in names
                if TURN.fullmatch(name) and entry["type"] == "file"
            )

    def read(self, key: str, found: Stored) -> bytes | None:
        """Return an object's bytes, one more than it had at most; None if it is gone."""
        with self._named("read"):
            try:
                return bytes(
                    self._files.cat_file(self._file(key, found.turn), start=0, end=found.nbytes + 1)
                )
            except FileNotFoundError:
                return None

    def create(self, key: str, turn: int, content: bytes) -> None:
        """Create an object.

        Raises:
            StaleTurnError: there is one.
        """
        with self._named("written"):
            if not self._has_buckets():
                self._files.makedirs(self._folder(key), exist_ok=True)
            try:
                self._files.pipe_file(self._file(key, turn), content, mode="create")
            except FileExistsError:
                raise StaleTurnError(f"turn {turn} is there already") from None

    def remove(self, key: str, turn: int) -> None:
        """Remove an object that may be gone already."""
        with self._named("removed"), suppress(FileNotFoundError):
            self._files.rm_file(self._file(key, turn))

    def remove_older(self, seconds: float) -> int:
        """Remove nothing: listing a bucket is dear, and its own rules remove what is old."""
        return 0

    def _require_conditions(self) -> None:
        """Refuse a store that lets a second writer replace what the first has written.

        Raises:
            ParkingError: it does, or nothing can be written there.
        """
        probe = f"{self._root}/.probe-{token_hex(8)}"
        with self._named("written"):
            if not self._has_buckets():
                self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(probe, b"1", mode="create")
            try:
                self._files.pipe_file(probe, b"2", mode="create")
            except FileExistsError:
                return
            finally:
                self._files.rm_file(probe)
        raise ParkingError(
            f"session store {shortened(self._url)} replaces objects that are there, so two servers "
            "could answer one turn; it must know conditional writes (If-None-Match)"
        )

    def _has_buckets(self) -> bool:
        """Tell whether it is an object store, which has no folders to make."""
        return not _BUCKETS.isdisjoint(_protocols(self._files))

    def _named(self, done: str) -> AbstractContextManager[None]:
        return foreign_errors(
            ParkingError, f"session store {shortened(self._url)} cannot be {done}"
        )

    def _folder(self, key: str) -> str:
        return f"{self._root}/{key[:2]}/{key}"

    def _file(self, key: str, turn: int) -> str:
        return f"{self._folder(key)}/{turn_name(turn)}"


def has_keys(url: str) -> bool:
    """Tell whether a name or a key stands in a store's URL, where others see it."""
    return _KEYS.match(url) is not None


def _require_url(url: str) -> None:
    """Refuse what fsspec could not take apart.

    Raises:
        InputError: it is no URL.
    """
    try:
        urlsplit(url)
    except ValueError as error:
        raise InputError(
            f"session store {shortened(url)}: {error}; expected a URL such as s3://BUCKET/PREFIX"
        ) from None


def _protocols(files: Any) -> tuple[str, ...]:
    found = files.protocol
    return (found,) if isinstance(found, str) else tuple(found)
