"""A store that fsspec opens: S3, GCS, Azure and others."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from typing import Any

from lminf_export.errors import InputError, ParkingError, shortened
from lminf_export.runtime.foreign_errors import foreign_errors
from lminf_export.runtime.parking.objects import TURN, StaleTurnError, Stored, turn_name

# Stores without folders to make.
_BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}


class FileSystemObjects:
    """Objects in a store that fsspec opens: s3://, gs://, az:// and others.

    Turns are created by conditional writes, which the store must have (S3, GCS and Azure do). Old
    objects are removed by the store's own lifecycle rules.

    Args:
        url: of the store.

    Raises:
        InputError: fsspec does not know such URLs.
        ParkingError: the store cannot be used, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url
        scheme = url.partition("://")[0]
        if scheme not in fsspec.available_protocols():
            raise InputError(f"session store {shortened(url)}: fsspec knows no {scheme}://")
        with self._named("opened"):
            # Nothing is cached: other machines write there, too.
            self._files, root = fsspec.core.url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=True
            )
        self._root = str(root).rstrip("/")

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

    def remove_older(self, seconds: float, now: float) -> int:
        """Remove nothing: listing a bucket is dear, and its own rules remove what is old."""
        return 0

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


def _protocols(files: Any) -> tuple[str, ...]:
    found = files.protocol
    return (found,) if isinstance(found, str) else tuple(found)
