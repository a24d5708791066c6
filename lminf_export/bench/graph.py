"""Reads a bundle's graph, without its weights."""

from __future__ import annotations

import onnx_ir as ir
from google.protobuf.message import DecodeError

from lminf_export.bundle.folder import Bundle
from lminf_export.errors import BundleError


def read_graph(bundle: Bundle) -> ir.Graph:
    """Return a bundle's graph; its weights stay in their files.

    Raises:
        BundleError: the file is no ONNX model.
    """
    try:
        return ir.load(bundle.graph_path).graph
    except (DecodeError, ir.serde.SerdeError) as error:
        reason = " ".join(str(error).split())
        raise BundleError(
            f"{bundle.graph_path} is no ONNX model ({reason}); export the model again"
        ) from error
