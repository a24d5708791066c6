"""The file of a state: safetensors with checked metadata, replaced in one step, read within bounds.

A file is eight bytes of the header's length, the header as JSON, and the arrays one behind the
other, in the header's order. Any reader of safetensors opens it. The header's `__metadata__` holds
strings; one of them is a CRC-32 over all the rest, so that a flipped bit is noticed.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lminf_export.bundle.files import sync
from lminf_export.disk import parse_json, user_path
from lminf_export.errors import InputError, SessionError, require_instance, shortened, shown
from lminf_export.runtime.arrays import arrays_in, starts_together
from lminf_export.tensors.dtypes import ELEMENT_TYPES

# What readers of safetensors take, and far beyond the header of a state.
MOST_HEADER_BYTES = 64 * 2**20
_CHECKSUM = "crc32"
_METADATA = "__metadata__"
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 64
_PIECE = 2**20
_DTYPES: dict[str, np.dtype] = {
    **{x.safetensors: np.dtype(x.numpy) for x in ELEMENT_TYPES.values() if x.name == x.numpy},
    # bfloat16 as numpy has it: its bits.
    "U16": np.dtype(np.uint16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def state_pieces(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> list[bytes | memoryview]:
    """Return the content of a file, in pieces that follow each other.

    Args:
        arrays: by name, of numpy's own types; the pieces are views of them where they can be.
        metadata: strings by name.

    Raises:
        InputError: its header would be too long.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    tensors: dict[str, Any] = {}
    end = 0
    for name, array in contiguous.items():
        start, end = end, end + array.nbytes
        tensors[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    checksum = _header_checksum(metadata, tensors)
    for array in contiguous.values():
        checksum = zlib.crc32(_bytes(array), checksum)
    header = {_METADATA: {**metadata, _CHECKSUM: f"{checksum:08x}"}, **tensors}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % _ALIGNMENT)
    if len(text) > MOST_HEADER_BYTES:
        raise InputError(
            "tokens that are not read yet, and labels, do not fit the header of a state's file, "
            f"{MOST_HEADER_BYTES >> 20} MiB; read the tokens first"
        )
    return [_LENGTH.pack(len(text)) + text, *map(_bytes, contiguous.values())]


def write_state_file(
    path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a file; a reader sees what stood there before, or all of it. Only its owner reads it.

    Args:
        path: the file, which is replaced.
        arrays: by name, of numpy's own types.
        metadata: strings by name.

    Raises:
        InputError: it cannot be written there, or see `state_pieces`.
    """
    place = _checked_path(path)
    pieces = state_pieces(arrays, metadata)
    with _replacing(place) as file:
        for piece in pieces:
            file.write(piece)


def require_place(path: str | Path) -> None:
    """Refuse a path where no file can be written, before the work that leads to the file.

    Raises:
        InputError: its folder is missing or closed, or it is no file.
    """
    place = _checked_path(path)
    try:
        if place.exists() and not place.is_file():
            raise InputError(f"{place} is not a file, so no state is written there")
        with tempfile.TemporaryFile(dir=place.parent):
            pass
    except OSError as error:
        raise InputError(f"cannot write {place}: {error.strerror or error}") from None


class StateFile:
    """An opened file whose header has been checked against the file's size.

    Args:
        file: of so many bytes.
        size: bytes.
        name: of the file, for messages.

    Attributes:
        name: of the file.
        metadata: strings by name, without the checksum.
        shapes: element type and shape of each array, by name, in the file's order.
    """

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self._file, self._size, self.name = file, size, name
        header, left = self._read_header()
        metadata = header.pop(_METADATA, None)
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise self.damaged("it has no metadata of a state")
        self._checksum = metadata.pop(_CHECKSUM, None)
        self.metadata: dict[str, str] = metadata
        self._tensors = header
        self.shapes = self._checked_tensors(left)

    @classmethod
    def of_bytes(cls, data: bytes) -> StateFile:
        """Read the header of a file's content.

        Raises:
            InputError: it is no content of a file.
            SessionError: it is not of this form, or was cut short.
        """
        require_instance("data", data, bytes)
        return cls(BytesIO(data), len(data), "the state in these bytes")

    @classmethod
    @contextmanager
    def open(cls, path: str | Path) -> Iterator[StateFile]:
        """Open a file and read its header.

        Raises:
            InputError: there is no such file, or it cannot be read.
            SessionError: it is no file of this form, or was cut short.
        """
        place = _checked_path(path)
        try:
            # A pipe of that name must not be waited for.
            if not stat.S_ISREG(place.stat().st_mode):
                raise InputError(f"{path} is not a file")
            with open(place, "rb") as file:
                yield cls(file, os.fstat(file.fileno()).st_size, str(path))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None

    def damaged(self, reason: str) -> SessionError:
        """Return the error of a file that is not as it was written."""
        return SessionError(
            f"{self.name} is damaged or no saved state: {reason}; save the state again"
        )

    def read(self) -> dict[str, np.ndarray]:
        """Return the arrays.

        Raises:
            SessionError: a bit is not as it was written.
        """
        tables = [(shape, dtype) for dtype, shape in self.shapes.values()]
        memory = np.empty(starts_together(tables)[-1], np.uint8)
        arrays = dict(zip(self.shapes, arrays_in(memory, tables), strict=True))
        checksum = _header_checksum(self.metadata, self._tensors)
        for array in arrays.values():
            content = _bytes(array)
            for start in range(0, len(content), _PIECE):
                piece = content[start : start + _PIECE]  # still in the processor's cache
                if self._file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                    raise self.damaged("it became shorter while it was read")
                checksum = zlib.crc32(piece, checksum)
        if self._checksum != f"{checksum:08x}":
            raise self.damaged("its content does not match its checksum")
        return arrays

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """Return the header and the number of bytes behind it."""
        size = self._size
        first = self._file.read(_LENGTH.size)
        length = int(_LENGTH.unpack(first)[0]) if len(first) == _LENGTH.size else size
        left = size - _LENGTH.size - length
        if length > MOST_HEADER_BYTES or left < 0:
            raise self.damaged("its header is not as long as it says")
        try:
            header = parse_json(self._file.read(length))
        except ValueError as error:
            raise self.damaged(f"its header is not JSON: {shortened(str(error))}") from None
        if not isinstance(header, dict):
            raise self.damaged("its header is not a table")
        return header, left

    def _checked_tensors(self, left: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        shapes = {}
        end = 0
        for name, tensor in self._tensors.items():
            if not isinstance(tensor, dict) or tensor.keys() != {"dtype", "shape", "data_offsets"}:
                raise self.damaged(f"its header says nothing of {shortened(name)}")
            dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
            if not isinstance(dtype, str) or dtype not in _DTYPES:
                raise self.damaged(f"{shortened(name)} is of no type that states have")
            if not _are_counts(shape) or len(shape) > 4 or not _are_counts(offsets):
                raise self.damaged(f"{shortened(name)} has no shape, or no place")
            start, end = end, end + math.prod(shape) * _DTYPES[dtype].itemsize
            if offsets != [start, end] or end > left:
                raise self.damaged(f"{shortened(name)} is not where the arrays before it end")
            shapes[name] = (_DTYPES[dtype], tuple(shape))
        if end != left:
            raise self.damaged(f"it holds {left} bytes of arrays, its header describes {end}")
        return shapes


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(x) is int and 0 <= x < 2**62 for x in values)


def _header_checksum(metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> int:
    text = json.dumps([dict(metadata), dict(tensors)], sort_keys=True)
    return zlib.crc32(text.encode())


def _bytes(array: np.ndarray) -> memoryview:
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)


def _checked_path(path: str | Path) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"a path is text, not a {type(path).__name__}")
    try:
        if b"\0" in os.fsencode(path):
            raise InputError("a path has no null character")
        if not os.fspath(path):
            raise InputError("the path of a state is empty; give a file")
    except UnicodeEncodeError:
        raise InputError(f"the path {shown(str(path))} has characters that no path has") from None
    place = user_path(path, InputError)
    # A link stays one: what it leads to is written.
    return Path(os.path.realpath(place)) if os.path.islink(place) else place


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file beside another one, which it replaces when all is on the disk."""
    # Named first: an interrupt at any moment leaves no file of this name behind.
    temporary = path.parent / f".state-{secrets.token_hex(8)}"
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a file, so no state is written there")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        # A folder that cannot be written has been named already.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
