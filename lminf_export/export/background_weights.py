"""Weights under way to the disk while their model is still being traced.

Tracing takes as long as copying the weights, one is bound by a processor and the other by the
disk. Which weights the graph will ask for can be told from the model; where that is wrong (some
models hold weights that nothing depends on) they are written again, afterwards.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from torch import nn

from lminf_export.checkpoint.conversion import Conversion
from lminf_export.tensors.dtypes import TORCH_TYPES, TYPE_NAMES
from lminf_export.tensors.pieces import Converted, Entry, Piece
from lminf_export.tensors.stored import InFiles, SourceTensor, StoredTensor
from lminf_export.tensors.writing import write_pieces

logger = logging.getLogger(__name__)

_TICK = 0.1  # seconds between two looks at how far it has come
_DTYPES = {kind: name for name, kind in TYPE_NAMES.items()}
_TYPES = {torch_type: _DTYPES[name] for name, torch_type in TORCH_TYPES.items()}


class EarlyWeights:
    """A weights file that a thread writes; leaving the context stops it.

    Args:
        path: the file.
        pieces: what it is to hold.
    """

    def __init__(self, path: Path, pieces: Sequence[Piece]) -> None:
        self._entries = _entries(pieces)
        self._stop = threading.Event()
        self._written = 0
        self._pool = ThreadPoolExecutor(1)
        self._writing = self._pool.submit(
            write_pieces, path, pieces, self._count, self._stop.is_set
        )

    def __enter__(self) -> EarlyWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def holds(self, pieces: Sequence[Piece]) -> bool:
        """Say whether the file is what these pieces make, but for the order of tensors."""
        return self._entries == _entries(pieces)

    def stop(self) -> None:
        """Give up if it is not done; the file is nobody's then."""
        self._stop.set()
        self._pool.shutdown()

    def result(self, progress: Callable[[int], None]) -> tuple[dict[str, StoredTensor], str]:
        """Wait for the file; return, and raise, what `write_pieces` does."""
        told = 0
        while not self._writing.done():
            wait([self._writing], _TICK)
            told, before = self._written, told
            progress(told - before)
        return self._writing.result()

    def _count(self, written: int) -> None:
        self._written += written


def foreseen_pieces(
    model: nn.Module, checkpoint: Mapping[str, SourceTensor]
) -> list[Converted] | None:
    """Return the weights that the graph of a model will ask for, by its parameters.

    Args:
        model: on the meta device, in the element types it is to have.
        checkpoint: the source's tensors.

    Returns:
        One piece for each, named as in the bundle; None where the checkpoint lacks one, which
        is for others to say, or where some are computed (dequantised, merged), which takes the
        processors and the memory that tracing needs.
    """
    named = Conversion.of(model).apply(checkpoint)
    groups: dict[int, list[str]] = {}
    parameters = model.state_dict(keep_vars=True)
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    pieces = []
    for group in groups.values():
        known = next((name for name in group if name in named), None)
        parameter = parameters[group[0]]
        if known is None or parameter.dtype not in _TYPES or not _lies_in_files(named[known]):
            logger.info("weights are written after tracing, because of %s", group[0])
            return None
        pieces.append(Converted(known, named[known], _TYPES[parameter.dtype]))
    return pieces


def _lies_in_files(tensor: SourceTensor) -> bool:
    return isinstance(tensor, InFiles) and tensor.stored() is not None


def _entries(pieces: Sequence[Piece]) -> frozenset[Entry]:
    return frozenset(entry for piece in pieces for entry in piece.entries)
