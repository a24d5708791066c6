"""Where a graph attends: nodes of fused attention, and softmaxes between two products.

Only the place is read from the graph's structure. What an attention computes is measured
(`measure.py`), so one description serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from lminf_export.errors import ModelError
from lminf_export.export.passes import editing
from lminf_export.rewriting.feeds import Inputs
from lminf_export.rewriting.fused_anchors import attention, group_query, multi_head
from lminf_export.rewriting.parts import read_values
from lminf_export.rewriting.places import SIZES, Places
from lminf_export.rewriting.product_anchors import product_below, softmax
from lminf_export.rewriting.searching import MICROSOFT, UNDERSTOOD, Anchor, Search, node_name

_SUMS = ("Add", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


def find_anchors(graph: ir.Graph, inputs: Inputs) -> list[Anchor]:
    """Return a graph's attentions in order.

    Raises:
        ModelError: naming one that is not understood, or that there is none.
    """
    places = Places(graph, inputs.positional)
    features = _features(graph, inputs)
    found: list[Anchor] = []
    softmaxes: dict[ir.Node, ir.Node] = {}  # by the products that end their attention
    for node in graph:
        decided = places.visit(node)
        if not decided:
            continue
        if not found:
            _refuse_added_positions(node, places, features)
        if editing.is_op(node, "Softmax"):
            softmaxes[product_below(node)[0]] = node
            continue
        finder = _FINDERS.get((node.domain, node.op_type))
        if finder is None and node.domain and "Attention" in node.op_type:
            raise ModelError(f"{node_name(node)} is not understood: {UNDERSTOOD}")
        start = softmaxes.get(node, node)
        if start is not node:
            finder = softmax
        if finder is None:
            continue
        anchor = finder(Search(graph, inputs, places, features), start)
        found.append(anchor)
        places.clear([anchor.output])
    if not found:
        raise ModelError(f"the graph attends nowhere: {UNDERSTOOD}, over a cache")
    return found


def _refuse_added_positions(node: ir.Node, places: Places, features: set[ir.Value]) -> None:
    """Refuse position embeddings that are added to those of the tokens, in front of it all.

    Raises:
        ModelError: the node adds them.
    """
    read = [value for value in node.inputs[:2] if value is not None]
    tokens = [value for value in read if places.free(value) and value in features]
    placed = [value for value in read if not places.free(value) and value not in features]
    if node.op_type in _SUMS and tokens and placed:
        raise ModelError(
            f"{node_name(node)} adds embeddings of positions to those of the tokens: they are "
            f"learned up to the training length and a stream goes beyond; a model with rotation, "
            f"ALiBi or no positions can be rewritten"
        )


def _features(graph: ir.Graph, inputs: Inputs) -> set[ir.Value]:
    """Return all values that are computed from the tokens themselves, not from their number."""
    found = {inputs.ids}
    for node in graph:
        if node.op_type not in SIZES and any(v in found for v in read_values(node)):
            found.update(node.outputs)
    return found - {inputs.ids}


_FINDERS: dict[tuple[str, str], Callable[[Search, ir.Node], Anchor]] = {
    (MICROSOFT, "GroupQueryAttention"): group_query,
    (MICROSOFT, "MultiHeadAttention"): multi_head,
    ("", "Attention"): attention,
}
