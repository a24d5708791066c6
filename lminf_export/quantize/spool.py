"""Blocks kept in files between being made and being written into a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lminf_export.quantize.formats import Blocks

_PARTS = ("packed", "scales", "zero_points")


@dataclass(frozen=True)
class SpooledBlocks:
    """The blocks of one weight in files of a folder.

    Attributes:
        folder: an existing folder.
        number: of the weight, which its files' names begin with.
    """

    folder: Path
    number: int

    def put(self, blocks: Blocks) -> None:
        """Write all rows of the weight."""
        for part in _PARTS:
            values = getattr(blocks, part)
            if values is not None:
                np.save(self._path(part), values)

    def rows(self, count: int) -> Iterator[Blocks]:
        """Yield up to `count` rows at a time."""
        files = {part: self._path(part) for part in _PARTS}
        found = {part: np.load(path, "r") for part, path in files.items() if path.exists()}
        for start in range(0, len(found["packed"]), count):
            rows = {part: np.array(values[start : start + count]) for part, values in found.items()}
            yield Blocks(rows["packed"], rows["scales"], rows.get("zero_points"))

    def _path(self, part: str) -> Path:
        return self.folder / f"{self.number}.{part}.npy"
