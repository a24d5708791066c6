"""The header of a GGUF file: metadata, and where each tensor lies.

`gguf.GGUFReader` makes an array of every number and string, which for a vocabulary of 262,144
takes many seconds and 0.7 GB, and believes every count that it reads. Here everything is checked
against the size of the file before it is read.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lminf_export.disk import is_file
from lminf_export.errors import ModelError, shortened
from lminf_export.tensors.gguf_blocks import GgufTensor, block_sizes

SUFFIX = ".gguf"
ALIGNMENT = "general.alignment"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Far beyond every file in use.
_MOST_TENSORS, _MOST_KEYS, _MOST_ITEMS, _MOST_STRINGS = 2**20, 2**16, 2**24, 2**22
_MOST_NAME, _MOST_STRING, _MOST_DIMENSION = 2**10, 2**24, 2**40
_STRING, _ARRAY, _BOOL = 8, 9, 7
# Number of a type in a file → struct's letter, and numpy's name, of a number.
_NUMBERS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file: its metadata and its tensors.

    Attributes:
        path: the file.
        metadata: by key: int, float, bool, str, or an array: a numpy array of numbers or a list of
            str. Bytes of a str that are not UTF-8 are replaced.
        tensors: by name, in the order of the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Damaged(Exception):
    """A file is not as its own numbers say; the text completes "it is damaged: …"."""


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file.

    Raises:
        ModelError: the file is missing, of another format, version or byte order, truncated or
            damaged, or has a tensor of a type that the package `gguf` does not know.
    """
    name = shortened(path.name)
    if not is_file(path):
        raise ModelError(f"GGUF file {name} is missing; the model is incomplete")
    try:
        with path.open("rb") as file:
            _check_start(file.read(8), name)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).read()
    except _Damaged as problem:
        raise ModelError(
            f"GGUF file {name} ({path.stat().st_size} bytes) is truncated or damaged: {problem}; "
            f"fetch it again"
        ) from None
    except OSError as error:
        raise ModelError(f"GGUF file {name} cannot be read: {error.strerror}") from error


def _check_start(start: bytes, name: str) -> None:
    if start[:4] != _MAGIC:
        raise ModelError(f"file {name} is not GGUF: it begins with {start[:4]!r}, not b'GGUF'")
    if len(start) < 8:
        raise _Damaged("it ends in its first line")
    (version,) = struct.unpack("<I", start[4:])
    if version in _VERSIONS:
        return
    if struct.unpack(">I", start[4:])[0] in _VERSIONS:
        raise ModelError(
            f"GGUF file {name} is big-endian, and little-endian files are read; convert it with "
            f"gguf-convert-endian of the package gguf"
        )
    raise ModelError(
        f"GGUF file {name} is of version {version}; versions 2 and 3 are read: get a newer file"
    )


class _Reader:
    """Reads values one after the other, never beyond the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._size, self._at = path, data, len(data), 8

    def read(self) -> GgufFile:
        count, keys = self._number("Q"), self._number("Q")
        if count > _MOST_TENSORS or keys > _MOST_KEYS:
            raise _Damaged(f"it claims {count} tensors and {keys} keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string(_MOST_NAME, "a key")
            if key in metadata:
                raise _Damaged(f"key {shortened(repr(key))} is there twice")
            metadata[key] = self._value(self._number("I"), key)
        entries = [self._entry() for _ in range(count)]
        alignment = metadata.get(ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment % 8:
            raise _Damaged(f"{ALIGNMENT} is {shortened(repr(alignment))}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise _Damaged(f"tensor {shortened(repr(name))} is there twice")
            if offset % alignment:
                raise _Damaged(f"tensor {shortened(name)} does not begin at a multiple of "
                               f"{alignment}")  # fmt: skip
            tensors[name] = self._tensor(name, shape, kind, start + offset)
        _check_apart(tensors)
        return GgufFile(self._path, metadata, tensors)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        short, known = shortened(repr(name)), block_sizes()
        if kind not in known:
            raise ModelError(
                f"tensor {short} of GGUF file {shortened(self._path.name)} is of type number "
                f"{kind}, which the installed package gguf does not know; get a file of another "
                f"quantisation, or a newer gguf"
            )
        type_name, block, _ = known[kind]
        if shape[-1] % block:
            raise _Damaged(
                f"tensor {short} of type {type_name} has rows of {shape[-1]} elements, which must "
                f"be a multiple of {block}"
            )
        tensor = GgufTensor(self._path, type_name, shape, offset)
        if offset + tensor.length > self._size:
            raise _Damaged(
                f"tensor {short} ends at byte {offset + tensor.length}, beyond the end of the file"
            )
        return tensor

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read name, dimensions (outermost first), number of the type and offset of a tensor."""
        name = self._string(_MOST_NAME, "a tensor's name")
        rank = self._number("I")
        if not 1 <= rank <= 4:
            raise _Damaged(f"tensor {shortened(repr(name))} has {rank} dimensions")
        shape = tuple(self._number("Q") for _ in range(rank))[::-1]
        size = 1
        for dimension in shape:
            size *= dimension
        if not 0 < size <= _MOST_DIMENSION:
            raise _Damaged(f"tensor {shortened(repr(name))} has shape {list(shape)}")
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, kind: int, key: str) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._string(_MOST_STRING, key)
        if kind != _ARRAY:
            raise _Damaged(f"key {shortened(repr(key))} is of the unknown type {kind}")
        item, count = self._number("I"), self._number("Q")
        if count > _MOST_ITEMS:
            raise _Damaged(f"key {shortened(repr(key))} claims {count} items")
        if item in _NUMBERS:
            dtype = np.dtype(_NUMBERS[item]).newbyteorder("<")
            return np.frombuffer(self._take(count * dtype.itemsize), dtype)
        if item == _STRING:
            if count > _MOST_STRINGS or count * 8 > self._size - self._at:
                raise _Damaged(f"key {shortened(repr(key))} claims {count} strings")
            return self._strings(count, key)
        raise _Damaged(f"key {shortened(repr(key))} holds a list of the type {item}")

    def _number(self, letter: str) -> Any:
        (value,) = struct.unpack("<" + letter, self._take(struct.calcsize("<" + letter)))
        return value

    def _string(self, most: int, what: str) -> str:
        length = self._number("Q")
        if length > most:
            raise _Damaged(f"{shortened(what)} claims {length} bytes")
        return self._take(length).decode("utf-8", errors="replace")

    def _strings(self, count: int, key: str) -> list[str]:
        """Read a list of strings; vocabularies have hundreds of thousands."""
        data, size, at, length_of = self._data, self._size, self._at, struct.Struct("<Q")
        found = []
        for _ in range(count):
            start = at + 8
            if start > size:
                raise _Damaged(f"its header goes on beyond its end at byte {size}")
            at = start + length_of.unpack_from(data, at)[0]
            if at > size:
                raise _Damaged(f"{shortened(key)} claims {at - start} bytes")
            found.append(data[start:at].decode("utf-8", "replace"))
        self._at = at
        return found

    def _take(self, count: int) -> bytes:
        stop = self._at + count
        if stop > self._size:
            raise _Damaged(f"its header goes on beyond its end at byte {self._size}")
        piece = self._data[self._at : stop]
        self._at = stop
        return piece


def _check_apart(tensors: Mapping[str, GgufTensor]) -> None:
    """Check that no two tensors have bytes in common."""
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise _Damaged(f"tensors {shortened(before)} and {shortened(name)} overlap")
        end, before = tensor.offset + tensor.length, name
