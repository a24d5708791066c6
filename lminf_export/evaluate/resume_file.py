"""The file from which an interrupted evaluation resumes; it is replaced atomically."""

from __future__ import annotations

import json
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lminf_export.disk import parse_json
from lminf_export.errors import InputError, shortened
from lminf_export.operator.settings import as_integer

VERSION = 1
_META = "meta"
# Raised by zipfile, zlib and numpy's own reader for bytes that they did not write.
_DAMAGES = (
    *(ValueError, LookupError, TypeError, AttributeError, EOFError, ArithmeticError),
    *(RuntimeError, SyntaxError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


@dataclass
class Track:
    """The progress of one method.

    Attributes:
        losses: (T,) nats of each position as a target, NaN where not known.
        done: tokens read.
        seconds: time it took.
        nbytes: bytes of its cache at most.
        stopped: why it ended early, or "".
        snapshot: its caches behind the last token read, or None.
    """

    losses: NDArray[np.float32]
    done: int = 0
    seconds: float = 0.0
    nbytes: int = 0
    stopped: str = ""
    snapshot: Mapping[str, np.ndarray] | None = None


@dataclass
class ResumeFile:
    """Tracks by method, kept in a file if there is a path.

    Attributes:
        path: the file, or None to keep nothing.
        identity: what the numbers depend on; a file of another evaluation is refused.
        tracks: method → how far it is.
    """

    path: Path | None
    identity: dict[str, Any]
    tracks: dict[str, Track] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, identity: dict[str, Any]) -> ResumeFile:
        """Resume from a file, or start one.

        Raises:
            InputError: the file is not of this evaluation, or damaged.
        """
        found = cls(path, identity)
        if path is not None and path.exists():
            found._read(path)
        return found

    def track(self, method: str, num_tokens: int) -> Track:
        """Return a method's track, its losses cut or lengthened to a number of tokens."""
        track = self.tracks.setdefault(method, Track(np.empty(0, np.float32)))
        losses = np.full(num_tokens, np.nan, np.float32)
        known = min(num_tokens, len(track.losses))
        losses[:known] = track.losses[:known]
        track.losses = losses
        return track

    def save(self) -> None:
        """Write the file anew; a reader sees the old one or the new one."""
        if self.path is None:
            return
        arrays: dict[str, np.ndarray] = {}
        meta: dict[str, Any] = {"version": VERSION, "identity": self.identity, "tracks": {}}
        for method, track in self.tracks.items():
            arrays[f"losses/{method}"] = track.losses
            for name, array in (track.snapshot or {}).items():
                arrays[f"snapshot/{method}/{name}"] = array
            meta["tracks"][method] = {
                "done": track.done,
                "seconds": track.seconds,
                "nbytes": track.nbytes,
                "stopped": track.stopped,
                "has_snapshot": track.snapshot is not None,
            }
        arrays[_META] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with open(fresh, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub declares bool
            fresh.replace(self.path)
        finally:
            fresh.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        try:
            arrays = _read_arrays(path)
            meta = parse_json(arrays.pop(_META).tobytes())
            found = meta["identity"] if meta["version"] == VERSION else None
            tracks = {
                method: _track(method, fields, arrays) for method, fields in meta["tracks"].items()
            }
        except OSError as error:
            if error.errno is not None:
                raise InputError(f"cannot read {path}: {error.strerror}") from None
            raise _damaged(path) from None
        except _DAMAGES:
            raise _damaged(path) from None
        for name, value in self.identity.items():
            if not isinstance(found, dict) or found.get(name) != value:
                raise InputError(
                    f"{path} is the state of another evaluation (its {name} is not this one's); "
                    "name another file, or delete it to start again"
                )
        self.tracks = tracks


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of a file as `save` writes it: stored, so never larger than the file."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as packed:
        if sum(entry.file_size for entry in packed.infolist()) > size:
            raise ValueError("it claims to hold more bytes than it has")
        found = {}
        for entry in packed.infolist():
            with packed.open(entry) as file:
                version = np.lib.format.read_magic(file)
                reader = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, by_column, dtype = reader(file)
                content = file.read()
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content):
                raise ValueError("an array is not of the size that it names")
            array = np.frombuffer(content, dtype).reshape(shape, order="F" if by_column else "C")
            found[entry.filename.removesuffix(".npy")] = array.copy()
    return found


def _track(method: str, fields: dict[str, Any], content: Mapping[str, np.ndarray]) -> Track:
    prefix = f"snapshot/{method}/"
    snapshot = {n.removeprefix(prefix): a for n, a in content.items() if n.startswith(prefix)}
    track = Track(
        losses=content[f"losses/{method}"],
        done=as_integer("done", fields["done"], 0, InputError),
        seconds=float(fields["seconds"]),
        nbytes=as_integer("nbytes", fields["nbytes"], 0, InputError),
        stopped=shortened(str(fields["stopped"]), 100),
        snapshot=snapshot if fields["has_snapshot"] else None,
    )
    if track.losses.ndim != 1 or track.losses.dtype != np.float32:
        raise ValueError("losses are a row of float32")
    if track.done > len(track.losses) or not 0 <= track.seconds < float("inf"):
        raise ValueError("more is done than there is")
    return track


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} is not a readable state file; name another file or delete it")
