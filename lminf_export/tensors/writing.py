"""Writes one safetensors file from pieces, and computes its SHA-256 in the same pass.

Three activities run in parallel: pieces are read and converted, or copied by the system where their
bytes lie unchanged in files; bytes that are written are hashed from the page cache; and they are
synced to the disk, so that the last `fsync` has little left to do. For a file too large for the
memory, pages of both files are dropped from the page cache once they are done with.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lminf_export.errors import ModelError
from lminf_export.tensors import page_cache
from lminf_export.tensors.files import read_header
from lminf_export.tensors.pieces import Chunk, Piece, stored_parts
from lminf_export.tensors.stored import BLOCK_BYTES, StoredTensor

# Bytes that the system copies in one call. While a model is traced the interpreter is seldom free
# to make the next one.
RANGE_BYTES = 64 * 2**20
_SYNC_BYTES = 256 * 2**20
_NOT_COPIED = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


class Stopped(Exception):
    """Writing was stopped by another thread."""


def write_pieces(
    path: Path,
    pieces: Sequence[Piece],
    progress: Callable[[int], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, StoredTensor], str]:
    """Write tensors to one safetensors file, each read, converted and written block by block.

    Args:
        path: the file to write; an existing file is replaced.
        pieces: its tensors, in the order of their bytes.
        progress: called with the bytes of each block that is written.
        stopped: called between blocks; true ends the writing.

    Returns:
        The place of each tensor in the file, and the file's SHA-256.

    Raises:
        ModelError: a value does not fit into the element type, or a file of the checkpoint ends
            early.
        Stopped: `stopped` returned true.
    """
    forgets = page_cache.is_too_large(sum(e.length for piece in pieces for e in piece.entries))
    with open(path, "w+b", buffering=0) as file, _Follower(file, forgets) as follower:
        follower.wrote(_write(file, _header(pieces)))
        for chunk in _one_ahead(_chunks(pieces, forgets)):
            for count in _put(file, chunk, forgets):
                follower.wrote(count)
                progress(count)
                if stopped():
                    raise Stopped
        digest = follower.digest()
    return read_header(path), digest


def _header(pieces: Sequence[Piece]) -> NDArray[np.uint8]:
    """Return the first bytes of a safetensors file: the header's length and the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in (entry for piece in pieces for entry in piece.entries):
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.length],
        }
        offset += entry.length
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # tensors start aligned
    return np.frombuffer(struct.pack("<Q", len(encoded)) + encoded, np.uint8)


def _chunks(pieces: Sequence[Piece], forgets: bool) -> Iterator[Chunk]:
    for piece in pieces:
        copied = False
        for chunk in piece.chunks():
            copied = isinstance(chunk, StoredTensor)
            yield chunk
        if forgets and not copied:  # a copy reads the source later, and drops its pages itself
            for part in stored_parts(piece.tensor):
                with open(part.path, "rb", buffering=0) as file:
                    page_cache.forget(file, part.offset, part.length)


def _one_ahead(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Yield chunks while the next one is already being read and converted in a thread."""
    iterator = iter(chunks)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, None)
        while (chunk := coming.result()) is not None:
            coming = pool.submit(next, iterator, None)
            yield chunk


def _put(file: FileIO, chunk: Chunk, forgets: bool) -> Iterator[int]:
    """Write a chunk at the end of a file; yield the bytes of each part once it is there."""
    if not isinstance(chunk, StoredTensor):
        yield _write(file, chunk)
        return
    with open(chunk.path, "rb", buffering=0) as source:
        done = 0
        while done < chunk.length:
            start = chunk.offset + done
            count = min(RANGE_BYTES, chunk.length - done)
            page_cache.expect(source, start + count, RANGE_BYTES)
            copied = _copy(source, file, start, count)
            if not copied:
                raise ModelError(f"weights file {chunk.path.name} was cut while it was read")
            if forgets:
                page_cache.forget(source, start, copied)
            done += copied
            yield copied


def _write(file: FileIO, chunk: NDArray[np.uint8]) -> int:
    left = chunk.data.cast("B") if chunk.nbytes else memoryview(b"")
    while left:
        left = left[file.write(left) :]
    return chunk.nbytes


def _copy(source: FileIO, to: FileIO, offset: int, count: int) -> int:
    """Append some bytes of a file to another, inside the system where that can be."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source.fileno(), to.fileno(), count, offset)
        except OSError as error:
            if error.errno not in _NOT_COPIED:
                raise
    source.seek(offset)
    return _write(to, np.frombuffer(source.read(min(count, BLOCK_BYTES)), np.uint8))


class _Follower:
    """Hashes a growing file and syncs it to the disk, some way behind the writer.

    Args:
        file: only appended to.
        forgets: whether pages that are hashed and on the disk are dropped.
    """

    def __init__(self, file: FileIO, forgets: bool) -> None:
        self._file, self._forgets = file, forgets
        self._digest = hashlib.sha256()
        self._hasher, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self._end = self._unsynced = self._hashed = 0
        self._syncing: Future[None] | None = None

    def __enter__(self) -> _Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown(cancel_futures=True)
        self._syncer.shutdown(cancel_futures=True)

    def wrote(self, count: int) -> None:
        """Take note of bytes at the end; waits where hashing is too far behind."""
        self._waiting.append(self._hasher.submit(self._hash, self._end, count))
        self._end += count
        self._unsynced += count
        while len(self._waiting) > 2:
            self._waiting.popleft().result()
        if self._unsynced >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                self._syncing.result()
            self._syncing, self._unsynced = self._syncer.submit(self._sync), 0

    def digest(self) -> str:
        """Wait for everything; return the file's SHA-256."""
        while self._waiting:
            self._waiting.popleft().result()
        if self._syncing is not None:
            self._syncing.result()
        return self._digest.hexdigest()

    def _sync(self) -> None:
        hashed = self._hashed
        os.fsync(self._file.fileno())
        if self._forgets:
            page_cache.forget(self._file, 0, hashed)

    def _hash(self, start: int, count: int) -> None:
        if not count:
            return
        page = start - start % mmap.ALLOCATIONGRANULARITY
        with (
            mmap.mmap(
                self._file.fileno(), start + count - page, access=mmap.ACCESS_READ, offset=page
            ) as pages,
            memoryview(pages)[start - page :] as written,
        ):
            self._digest.update(written)
        self._hashed = start + count
