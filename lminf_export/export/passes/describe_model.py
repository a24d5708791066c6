"""Set the file's description: format, producer, name and metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.export.passes.checking import ensure, require

IR_VERSION = 11
PRODUCER = "lminf-export"
GRAPH_NAME = "lambda_decoder"
# The key of the metadata that has the producer's version.
VERSION_KEY = "lminf_export"


@dataclass(frozen=True)
class DescribeModelPass(ir.passes.InPlacePass):
    """Set the file's description, and remove torch's notes on the origin of values.

    Requires: metadata are texts under names.
    Ensures: the description is this package's; inputs, outputs and initializers carry no notes.

    Attributes:
        metadata: ONNX metadata_props.
    """

    metadata: Mapping[str, str]

    def requires(self, model: ir.Model) -> None:
        texts = [text for pair in self.metadata.items() for text in pair]
        require(all(isinstance(text, str) for text in texts), "metadata are not texts")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        model.ir_version = IR_VERSION
        model.producer_name, model.producer_version = PRODUCER, self.metadata.get(VERSION_KEY, "")
        model.graph.name = GRAPH_NAME
        model.metadata_props.update(self.metadata)
        for value in _ends(model.graph):
            value.metadata_props.clear()
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        described = (model.ir_version, model.producer_name, model.graph.name)
        ensure(described == (IR_VERSION, PRODUCER, GRAPH_NAME), f"the file is of {described}")
        ensure(self.metadata.items() <= model.metadata_props.items(), "metadata are missing")
        noted = [value.name for value in _ends(model.graph) if value.metadata_props]
        ensure(not noted, f"values carry notes: {noted[:3]}")


def _ends(graph: ir.Graph) -> tuple[ir.Value, ...]:
    return (*graph.inputs, *graph.outputs, *graph.initializers.values())
