"""Which of the values that hold an attention's queries, keys and values lie in a known layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from lminf_export.errors import ModelError, shortened
from lminf_export.rewriting.feeds import Inputs
from lminf_export.rewriting.layouts import Layout, Layouts, Shapes, find_layout, known_layout
from lminf_export.rewriting.parts import read_values
from lminf_export.rewriting.places import SIZES
from lminf_export.rewriting.searching import Anchor

_NAMES = {"query": "queries", "key": "keys", "value": "values", "output": "results"}


def choose(
    anchor: Anchor, shapes: Mapping[ir.Value, Shapes], dims: tuple[int, int], inputs: Inputs
) -> tuple[Anchor, Layouts]:
    """Return an attention with its tensors in layouts that are known.

    Args:
        anchor: as it was found.
        shapes: of its candidates.
        dims: D, of its caches of keys and of values.
        inputs: of the graph.

    Raises:
        ModelError: there are none, or the attention depends on tokens in another way too.
    """
    dim, of_values = dims
    if dim != of_values:
        raise ModelError(
            f"{anchor.name} caches keys of {dim} dimensions and values of {of_values}; expected "
            f"values of as many dimensions as keys"
        )
    chosen: dict[str, ir.Value] = {}
    layouts: dict[str, Layout] = {}
    for field, what in _NAMES.items():
        values = anchor.candidates[field]
        known = [v for v in values if known_layout(shapes[v], dim) is not None]
        chosen[field] = known[0] if known else values[0]
        layouts[field] = find_layout(shapes[chosen[field]], dim, f"the {what} of {anchor.name}")
    groups = layouts["key"].heads
    fitting = [v for v in anchor.candidates["keys"] if _cached(shapes[v], groups, dim)]
    if not fitting:
        found = shapes[anchor.keys][0]
        raise ModelError(
            f"{anchor.name} caches keys of shape {found}; expected (batch, {groups} heads, tokens, "
            f"{dim}), or what is transposed to that"
        )
    _require_same_heads(anchor, layouts)
    anchor = replace(
        anchor,
        query=chosen["query"],
        key=chosen["key"],
        value=chosen["value"],
        keys=fitting[0],
        output=chosen["output"],
    )
    _require_closed(anchor, inputs.ids)
    return anchor, Layouts(**layouts)


def _cached(shapes: Shapes, groups: int, dim: int) -> bool:
    short, long = shapes
    return all(len(s) == 4 and (s[0], s[1], s[3]) == (1, groups, dim) for s in (short, long))


def _require_same_heads(anchor: Anchor, layouts: Mapping[str, Layout]) -> None:
    """Values have as many dimensions as keys, or what lies side by side is not heads of D.

    Raises:
        ModelError: they have others.
    """
    for one, other in (("key", "value"), ("query", "output")):
        here, there = layouts[one].heads, layouts[other].heads
        if here != there:
            raise ModelError(
                f"{anchor.name} has {here} heads of {layouts[one].head_dim} dimensions in its "
                f"{_NAMES[one]} and would have {there} in its {_NAMES[other]}; expected values of "
                f"as many dimensions as keys"
            )


def _require_closed(anchor: Anchor, ids: ir.Value) -> None:
    """Check that attention sees tokens through its queries, keys and values only.

    Raises:
        ModelError: naming what else depends on the tokens, such as a gate on the scores.
    """
    given = {anchor.query, anchor.key, anchor.value, anchor.past_key, anchor.past_value}
    seen: set[ir.Value] = set()
    open_values = [(value, value) for value in (anchor.output, anchor.keys)]
    while open_values:
        value, reader = open_values.pop()
        if value in seen or value in given:
            continue
        seen.add(value)
        if value is ids:
            raise ModelError(
                f"{anchor.name} depends on tokens besides by its queries, keys and values, through "
                f"{shortened(repr(reader.name), 60)}: no such attention is known"
            )
        node = value.producer()
        if node is not None and node.op_type not in SIZES:
            outside = node.outputs[0] if ids in node.inputs else value
            open_values += [(v, outside) for v in read_values(node)]
