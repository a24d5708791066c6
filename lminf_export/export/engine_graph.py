"""The graph an engine is built from, made of the exported one."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError

from lminf_export.engine.common import EngineRequest
from lminf_export.errors import EngineError
from lminf_export.export.passes import pipelines


def write_engine_graph(onnx_path: Path, request: EngineRequest) -> None:
    """Write the graph of an engine to `request.onnx_path`; the weights stay where they are.

    Args:
        onnx_path: the exported graph, in the same folder, since weights are found relative to it.
        request: what is to be built; its layers are the graph's.

    Raises:
        EngineError: the graph cannot be read or written, is not one of ours, or has a setting
            beyond what a parser can pass to a plugin.
    """
    out_path = request.onnx_path
    assert out_path.parent.resolve() == onnx_path.parent.resolve(), "weights would be lost"
    model = _load(onnx_path)
    try:
        pipelines.run(model, pipelines.for_engine(request))
    except EngineError as error:
        raise EngineError(f"{onnx_path}: {error}") from error
    try:
        ir.save(model, out_path)
    except OSError as error:
        raise EngineError(f"cannot write {out_path}: {error.strerror}") from error


def _load(path: Path) -> ir.Model:
    """Read a graph, its weights left where they are."""
    try:
        return ir.load(path)
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error
    except DecodeError as error:
        raise EngineError(f"{path} is not an ONNX model: {error}") from error
