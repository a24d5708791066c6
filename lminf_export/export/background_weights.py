"""Writes the weights file in a thread while the model is traced.

Tracing takes about as long as copying the weights: the processor limits the one, the disk the
other. The weights that the graph will need are predicted from the model's parameters. Some models
hold parameters that nothing depends on; the prediction is then wrong, and the file is written
again after tracing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.tensors.dtypes import WEIGHT_DTYPES
from lminf_export.tensors.pieces import Converted, Entry, Piece
from lminf_export.tensors.stored import InFiles, SourceTensor, StoredTensor
from lminf_export.tensors.torch_dtypes import dtype_name
from lminf_export.tensors.writing import write_pieces

logger = logging.getLogger(__name__)

_TICK = 0.1  # seconds between two progress reports


class BackgroundWeights:
    """A weights file that a thread writes; leaving the context stops the thread.

    Args:
        path: the file.
        pieces: its tensors.
    """

    def __init__(self, path: Path, pieces: Sequence[Piece]) -> None:
        self._entries = _entries(pieces)
        self._stop = threading.Event()
        self._written = 0
        self._pool = ThreadPoolExecutor(1)
        self._writing = self._pool.submit(
            write_pieces, path, pieces, self._count, self._stop.is_set
        )

    def __enter__(self) -> BackgroundWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def holds(self, pieces: Sequence[Piece]) -> bool:
        """Return whether the file consists of these pieces, in any order."""
        return self._entries == _entries(pieces)

    def stop(self) -> None:
        """Stop an unfinished write; the file is then incomplete and must not be used."""
        self._stop.set()
        self._pool.shutdown()

    def result(self, progress: Callable[[int], None]) -> tuple[dict[str, StoredTensor], str]:
        """Wait for the file, and report progress; returns and raises as `write_pieces`."""
        reported = 0
        while not self._writing.done():
            wait([self._writing], _TICK)
            reported, before = self._written, reported
            progress(reported - before)
        return self._writing.result()

    def _count(self, written: int) -> None:
        self._written += written


def expected_pieces(
    skeleton: Skeleton, checkpoint: Mapping[str, SourceTensor]
) -> list[Converted] | None:
    """Return the weights that the graph of a model is expected to need: all its parameters.

    Args:
        skeleton: of the model, in the element type of the bundle.
        checkpoint: the source's tensors.

    Returns:
        One piece for each, named as in the bundle. None where the checkpoint lacks a tensor
        (`write_graph` raises the error), and where tensors are computed (dequantised, merged):
        that would take the processors and the memory that tracing needs.
    """
    named = skeleton.conversion.apply(checkpoint)
    pieces = []
    for group in skeleton.groups:
        known = next((name for name in group if name in named), None)
        dtype = dtype_name(skeleton.tensors[group[0]].dtype)
        if known is None or dtype not in WEIGHT_DTYPES or not _lies_in_files(named[known]):
            logger.info("weights are written after tracing, because of %s", group[0])
            return None
        pieces.append(Converted(known, named[known], dtype))
    return pieces


def _lies_in_files(tensor: SourceTensor) -> bool:
    return isinstance(tensor, InFiles) and tensor.stored() is not None


def _entries(pieces: Sequence[Piece]) -> frozenset[Entry]:
    return frozenset(entry for piece in pieces for entry in piece.entries)
