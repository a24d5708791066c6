"""Whether the files of a foreign model are whole: cut copies, and pointers of Git LFS."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import onnx_ir as ir

from lminf_export.errors import ModelError, shortened

_LFS = b"version https://git-lfs.github.com/spec/"


def check_graph_file(path: Path) -> None:
    """Check that a graph's file has content, and that of a graph.

    Raises:
        ModelError: it is empty, or stands for a file that Git LFS has.
    """
    beginning = _beginning(path)
    if not beginning:
        raise ModelError(f"{path} is not an ONNX model: it is empty; copy the model again")
    if beginning == _LFS:
        raise ModelError(f"{path} is not an ONNX model: {_pointer(path)}")


def check_weight_file(file: Path, needed: int) -> None:
    """Check that a file of weights has all the bytes that a graph reads.

    Args:
        file: of weights.
        needed: bytes from its start to the end of the last tensor.

    Raises:
        ModelError: it is shorter, or stands for a file that Git LFS has.
    """
    size = file.stat().st_size
    if size >= needed:
        return
    shown = shortened(repr(file.name), 60)
    if _beginning(file) == _LFS:
        raise ModelError(f"the graph's weights {shown} are not here: {_pointer(file)}")
    raise ModelError(
        f"the graph's weights {shown} are cut: the file has {size:,} bytes, the graph reads "
        f"{needed:,}; copy it again"
    )


def bytes_needed(model: ir.Model) -> dict[str, int]:
    """Return for each file of weights the bytes from its start to the end of its last tensor."""
    needed: defaultdict[str, int] = defaultdict(int)
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                end = (tensor.offset or 0) + max(tensor.length or 0, tensor.nbytes)
                location = str(tensor.location)
                needed[location] = max(needed[location], end)
    return needed


def _beginning(path: Path) -> bytes:
    """Return the first bytes of a file, as many as the mark of a pointer has."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def _pointer(path: Path) -> str:
    return (
        f"it is a pointer of Git LFS; run `git lfs pull --include {shortened(path.name, 60)}` in "
        f"its repository, or download the file"
    )
