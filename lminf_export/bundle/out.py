"""Reads the destination of an export: a folder, or a file whose name implies one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lminf_export.errors import ExportError

DEFAULT_GRAPH_NAME = "model.onnx"
_PRODUCTS = {".plan": "an engine", ".onnx": "a graph"}
# Suffixes that count as file types; ".1-8b" or ".3" is part of a model's name.
_FILE_TYPE = re.compile(r"\.[A-Za-z][A-Za-z0-9]*")


@dataclass(frozen=True)
class OutTarget:
    """The destination of an export.

    Attributes:
        directory: the bundle's folder.
        graph_name: file name of the ONNX graph in it.
        engine_name: file name of the engine's plan, None if no engine is asked for.
    """

    directory: Path
    graph_name: str = DEFAULT_GRAPH_NAME
    engine_name: str | None = None


def parse_out(out: str | Path) -> OutTarget:
    """Read an `--out`: a folder, or the product that is to be written last into a folder.

    `DIR` and `DIR/` are that folder. `DIR/NAME.plan` is the folder DIR with an engine of that
    name, `DIR/NAME.onnx` with a graph of that name; without DIR the folder is `./NAME/`.
    Any other file type is refused. A suffix counts as a file type when it is letters and
    digits that begin with a letter: `out.xyz` is refused, `out-3.1` and `llama-3.1-8b` are
    folders, and a trailing slash makes any name a folder.

    Raises:
        ExportError: for an empty name or an unknown file type.
    """
    text = os.fspath(out)
    path = Path(text)
    if not text.strip() or "\0" in text:
        raise ExportError(f"--out {text!r}: must name a folder, or a .plan or .onnx file in one")
    if text.endswith(("/", os.sep)) or not _FILE_TYPE.fullmatch(path.suffix):
        return OutTarget(path)
    if path.suffix not in _PRODUCTS:
        raise ExportError(
            f"--out {text}: cannot write a {path.suffix} file; name a folder, NAME.onnx for a "
            f"graph or NAME.plan for an engine (a folder of that name: {text}/)"
        )
    directory = path.parent if path.parent != Path() else Path(path.stem)
    if path.suffix == ".plan":
        return OutTarget(directory, engine_name=path.name)
    return OutTarget(directory, graph_name=path.name)
