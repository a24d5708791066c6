"""Reads a bundle's graph, without its weights."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from google.protobuf.message import DecodeError

from lminf_export.bundle.folder import Bundle
from lminf_export.errors import BundleError
from lminf_export.operator.contract import DOMAIN

# Element types of what is no weight: sizes, axes, places.
_COUNTS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
# The place of the bytes of a weight: file and offset, or its name where it is in the graph.
Place = tuple[str, int]


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


def stored_weights(
    bundle: Bundle, graph: ir.Graph
) -> Iterator[tuple[ir.Value, ir.TensorProtocol, Place]]:
    """Yield the initializers that hold weights, scales among them, and where their bytes are.

    An export puts every weight into a file and nothing else. A rewritten graph keeps its weights
    where they were, the graph itself among the places, and has constants in both.

    Args:
        bundle: of the graph.
        graph: as `read_graph` gives it.
    """
    is_rewritten = bundle.manifest.source.rewritten is not None
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        place: Place = (name, -1)
        if isinstance(tensor, ir.ExternalTensor):
            place = (str(tensor.location), tensor.offset or 0)
        if is_rewritten:
            is_own = name.startswith(f"{DOMAIN}.")  # tables of angles, slopes
            if is_own or tensor.dtype in _COUNTS or tensor.size < 2:
                continue
        elif not isinstance(tensor, ir.ExternalTensor):
            continue
        yield value, tensor, place
