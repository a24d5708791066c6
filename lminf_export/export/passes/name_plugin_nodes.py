"""Attention nodes are checked for the plugin and named after their layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.engine.plugin_node import OPERATORS, cache_updates
from lminf_export.errors import EngineError
from lminf_export.export.passes.checking import ensure, require
from lminf_export.export.passes.editing import is_op
from lminf_export.operator import contract

# Parsers hand attributes to a plugin as 32-bit integers.
_MAX_ATTRIBUTE = 2**31 - 1


@dataclass(frozen=True)
class NamePluginNodesPass(ir.passes.InPlacePass):
    """Name the first output of each layer's node `lambda_attention.LAYER`.

    Requires: the operator's body is gone.
    Ensures: the nodes, so named, update the caches of all layers.

    Attributes:
        updates: past name → present name of every cache that a plugin updates in place.
        num_layers: how many nodes there must be.

    Raises:
        EngineError: the graph has other nodes, or a setting that no parser can pass to a plugin.
    """

    updates: Mapping[str, str]
    num_layers: int

    def requires(self, model: ir.Model) -> None:
        bodies = [key for key in model.functions if key[1] in OPERATORS]
        require(not bodies, f"{contract.OP_TYPE} still has a body")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = _nodes(model)
        for index, node in enumerate(nodes):
            _check_attributes(node)
            # NameNodesPass names a node after its first output, so messages name the layer.
            node.outputs[0].name = f"lambda_attention.{index}"
        missing = self.updates.items() - _updates(nodes).items()
        if missing or len(nodes) != self.num_layers:
            what = f", {min(missing)[0]} is not updated by one" if missing else ""
            raise EngineError(
                f"the graph has {len(nodes)} {contract.OP_TYPE} nodes for "
                f"{self.num_layers} layers{what}; export the model again"
            )
        return ir.passes.PassResult(model, bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        nodes = _nodes(model)
        names = [node.outputs[0].name for node in nodes]
        wanted = [f"lambda_attention.{index}" for index in range(self.num_layers)]
        ensure(names == wanted, f"the plugin's nodes make {names}")
        ensure(self.updates.items() <= _updates(nodes).items(), "caches are not updated")


def _nodes(model: ir.Model) -> list[ir.Node]:
    return [
        node
        for node in model.graph
        if any(is_op(node, operator, contract.DOMAIN) for operator in OPERATORS)
    ]


def _updates(nodes: list[ir.Node]) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in nodes:
        inputs = [value.name if value is not None else None for value in node.inputs]
        found |= cache_updates(inputs, [value.name for value in node.outputs])
    return found


def _check_attributes(node: ir.Node) -> None:
    for name, attribute in node.attributes.items():
        value = attribute.value
        if isinstance(value, int) and abs(value) > _MAX_ATTRIBUTE:
            raise EngineError(
                f"{name}={value} of {node.name} is above the limit of a plugin's "
                f"attribute ({_MAX_ATTRIBUTE}); export with a smaller one, or build with "
                "--plugin none"
            )
