"""A graph brought to the opset of the operator's body."""

from __future__ import annotations

import logging

import onnx
import onnx_ir as ir
from onnxscript import version_converter

from lminf_export.errors import ModelError, shortened
from lminf_export.export.passes import editing
from lminf_export.operator.attention_body import OPSET
from lminf_export.rewriting.recording import Recorder

# Beside its Attention, which is gone by now, opset 25 brought nothing but types of two bits.
_RELABELLED = 25
_LOWEST = 18  # of onnxscript's converter; onnx's own goes before it


def to_opset(model: ir.Model) -> ir.Model:
    """Return a graph in the opset of the operator's body; it may be changed in place.

    Raises:
        ModelError: it cannot be converted.
    """
    _standard_norms(model.graph)
    version = model.opset_imports.get("", 1)
    if version == _RELABELLED:
        version = model.opset_imports[""] = OPSET
    if version > OPSET:
        raise ModelError(
            f"the graph is of opset {version}, newer than {OPSET}, which the operator's body is "
            f"written in; export the model with an opset of at most {OPSET}"
        )
    if version < _LOWEST:
        model = _by_onnx(model, _LOWEST)
    logger = logging.getLogger("onnxscript")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        version_converter.convert_version(model, OPSET)
    finally:
        logger.setLevel(before)
    if model.opset_imports.get("") != OPSET:
        raise ModelError(
            f"the graph of opset {version} cannot be brought to opset {OPSET}; export the model "
            f"with a newer opset"
        )
    return model


def _by_onnx(model: ir.Model, version: int) -> ir.Model:
    """Convert by onnx's converter, which knows old opsets; weights in files stay there."""
    proto = ir.to_proto(model)
    try:
        return ir.from_proto(onnx.version_converter.convert_version(proto, version))
    except Exception as error:  # its errors have no common base
        reason = shortened(" ".join(str(error).split()), 160)
        raise ModelError(
            f"the graph's opset cannot be raised to {version} ({reason}); export the model with "
            f"opset {version} or newer"
        ) from error


def _standard_norms(graph: ir.Graph) -> None:
    """Write onnxruntime's SimplifiedLayerNormalization as the standard's RMSNormalization."""
    for node in list(graph):
        if not editing.is_op(node, "SimplifiedLayerNormalization"):
            continue
        if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
            continue
        op = Recorder()
        op.RMSNormalization(
            *node.inputs[:2],
            axis=node.attributes.get_int("axis", -1),
            epsilon=node.attributes.get_float("epsilon", 1e-5),
            stash_type=node.attributes.get_int("stash_type", 1),
        )
        editing.replace(graph, node, op.nodes)
