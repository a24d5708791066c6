"""One place where a graph attends, and the way from what it takes to where that came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.errors import ModelError, shortened
from lminf_export.rewriting.feeds import Inputs
from lminf_export.rewriting.parts import nodes_between, read_values
from lminf_export.rewriting.places import SIZES, Places, origins

MICROSOFT = "com.microsoft"
UNDERSTOOD = (
    "expected GroupQueryAttention, MultiHeadAttention, Attention, or a product, softmax and product"
)
# Operators that change a tensor's shape only, and how many of them in a row are followed.
_SHAPING = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast"}
_MOST_STEPS = 6


@dataclass(frozen=True)
class Anchor:
    """One attention of a graph.

    Attributes:
        kind: the operator's name, or "MatMul, Softmax, MatMul".
        node: for messages.
        query: (…) the new tokens' queries before any rotation, in whatever layout.
        key: the new tokens' keys, as query.
        value: the new tokens' values, as query.
        past_key: (B, G, P, D) the graph's input with earlier keys, or its view.
        past_value: as past_key.
        keys: (B, G, P + S, D) all keys as they are cached.
        output: what the new tokens attend to.
        candidates: by the names of these fields, values that are the same in other layouts, the
            one that was found first.
    """

    kind: str
    node: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    keys: ir.Value
    output: ir.Value
    candidates: Mapping[str, Sequence[ir.Value]]

    @property
    def name(self) -> str:
        """The node's name in messages."""
        return node_name(self.node)


def node_name(node: ir.Node) -> str:
    """Return how messages call a node."""
    return shortened(f"{node.op_type} {node.name or node.outputs[0].name}", 90)


@dataclass(frozen=True)
class Search:
    """The things that finders need."""

    graph: ir.Graph
    inputs: Inputs
    places: Places
    features: set[ir.Value]

    def anchor(
        self,
        kind: str,
        node: ir.Node,
        operands: tuple[ir.Value, ir.Value, ir.Value],
        output: ir.Value,
        *,
        pasts: tuple[ir.Value, ir.Value] | None = None,
        keys: ir.Value | None = None,
    ) -> Anchor:
        """Trace what attention takes to the tensors of the new tokens and to the caches."""
        _, key, value = operands
        name = node_name(node)
        past_key, past_value = pasts or (
            self._cache_of(key, f"the keys of {name}"),
            self._cache_of(value, f"the values of {name}"),
        )
        names = {"query": "queries", "key": "keys", "value": "values"}
        candidates: dict[str, Sequence[ir.Value]] = {
            field: origins(self.places, operand, f"the {what} of {name}", self.features)
            for operand, (field, what) in zip(operands, names.items(), strict=True)
        }
        candidates["keys"] = _rearranged(keys or self._joined(key, past_key))
        candidates["output"] = _rearranged(output)
        return Anchor(
            kind=kind,
            node=node,
            past_key=past_key,
            past_value=past_value,
            candidates=candidates,
            **{field: values[0] for field, values in candidates.items()},
        )

    def _cache_of(self, value: ir.Value, what: str) -> ir.Value:
        found = nearest(value, set(self.inputs.caches), self.places)
        if len(found) != 1:
            raise ModelError(f"{what} come from {len(found)} caches of the graph's inputs, not one")
        return found.pop()

    def _joined(self, value: ir.Value, past: ir.Value) -> ir.Value:
        """Return where earlier keys, on the way to a value, meet those of the new tokens."""
        made_of_past = {past}
        for node in nodes_between([past], [value]):
            if node.op_type in SIZES or made_of_past.isdisjoint(read := set(read_values(node))):
                continue
            if read & self.features:
                return node.outputs[0]
            made_of_past.update(node.outputs)
        raise ModelError(
            f"the cache {shortened(repr(past.name), 40)} meets no keys of new tokens: attention "
            f"over what a prompt alone left there (cross attention) cannot be rewritten"
        )

    def cache_input(self, value: ir.Value | None, what: str, node: ir.Node) -> ir.Value:
        """Check that a node's cache is an input of the graph."""
        if value is None or value not in self.inputs.caches:
            found = "none" if value is None else shortened(repr(value.name), 40)
            raise ModelError(
                f"{node_name(node)} takes no {what} from the graph's inputs (found {found}): "
                f"export the model with a cache (with-past, use_cache)"
            )
        return value


def nearest(value: ir.Value, caches: set[ir.Value], places: Places) -> set[ir.Value]:
    """Return the caches that a value is made of, other attentions left out."""
    found: set[ir.Value] = set()
    seen: set[ir.Value] = set()
    open_values = [value]
    while open_values:
        current = open_values.pop()
        if current in seen or (places.free(current) and current not in caches):
            continue
        seen.add(current)
        if current in caches:
            found.add(current)
            continue
        node = current.producer()
        if node is not None and node.op_type not in SIZES:
            open_values += list(read_values(node))
    return found


def _rearranged(value: ir.Value) -> list[ir.Value]:
    """Return a value and what its only reader, and that one's, rearranges it to."""
    found = [value]
    while len(found) < _MOST_STEPS and len(uses := found[-1].uses()) == 1:
        use = next(iter(uses))
        if use.node.domain or use.node.op_type not in _SHAPING or use.idx:
            break
        found.append(use.node.outputs[0])
    return found
