"""The way from the last layer to the logits, and what else meets it there."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

_LONGEST = 16  # nodes


def way_up(logits: ir.Value) -> list[tuple[ir.Node, ir.Value]]:
    """Return the nodes from the logits upwards, each with the input that the way goes on by."""
    way: list[tuple[ir.Node, ir.Value]] = []
    value = logits
    while len(way) < _LONGEST and (node := value.producer()) is not None:
        known = [v for v in node.inputs if v is not None and v.const_value is None]
        above = next((v for v in known if is_fed(v)), None)
        if above is None:
            break
        way.append((node, above))
        value = above
    return way


def others_are_fed(node: ir.Node, above: ir.Value, below: Collection[ir.Value] = ()) -> bool:
    """Say whether a node reads more that depends on an input than the value above it.

    Args:
        node: on the way.
        above: what the way goes on by.
        below: values that do not count, nor what depends on an input through them alone.
    """
    return any(v is not None and v is not above and is_fed(v, below) for v in node.inputs)


def is_fed(value: ir.Value, but: Collection[ir.Value] = ()) -> bool:
    """Say whether a value depends on an input of the graph, other than through some values."""
    seen = set(but)
    left = [value]
    while left:
        value = left.pop()
        if value in seen or value.const_value is not None:
            continue
        seen.add(value)
        node = value.producer()
        if node is None:
            return True
        left += [v for v in node.inputs if v is not None]
    return False
