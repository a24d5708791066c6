"""A rewritten graph made faster where operators compute the same from the same weights."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from lminf_export.export.passes import editing
from lminf_export.rewriting.assembling import Assembled
from lminf_export.rewriting.recording import Recorder
from lminf_export.rewriting.rows import to_rows

_HEADS_FIRST = (0, 2, 1, 3)


def tune(model: ir.Model, known: Assembled) -> None:
    """Make a rewritten graph faster, in place.

    Args:
        model: the graph, before it has bodies of operators.
        known: what is known of its values.
    """
    for node in list(model.graph):
        if editing.is_op(node, "Split"):
            _split_heads(model.graph, node)
    to_rows(model, known.ids, known.shapes, [known.index])
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def _split_heads(graph: ir.Graph, split: ir.Node) -> None:
    """Split queries, keys and values when they are heads already: one transposition for all.

    Split(x) → Reshape, Transpose of each part becomes Reshape, Transpose → Split of heads.
    """
    found = [_in_heads(part) for part in split.outputs]
    parts = [part for part in found if part is not None]
    x = split.inputs[0]
    if len(parts) != len(found) or len({dim for _, dim, _ in parts}) != 1 or x is None:
        return
    heads = [count for count, _, _ in parts]
    dim = parts[0][1]
    op = Recorder()
    whole = op.Reshape(x, op.integers(0, 0, sum(heads), dim))
    turned = op.Transpose(whole, perm=_HEADS_FIRST)
    new = op.Split(turned, op.integers(*heads), axis=1, _outputs=len(heads))
    graph.insert_before(split, op.nodes)
    for value, (_, _, old) in zip(new, parts, strict=True):
        value.type = old.type
        ir.convenience.replace_all_uses_with(old, value)


def _in_heads(value: ir.Value) -> tuple[int, int, ir.Value] | None:
    """Return heads, dimensions and result where a value is only put into heads, else None."""
    uses = list(value.uses())
    reshape = uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
    if not editing.is_op(reshape, "Reshape") or uses[0].idx:
        return None
    target = editing.const_ints(reshape.inputs[1]) or []
    shaped = reshape.outputs[0]
    users = list(shaped.uses())
    transpose = users[0].node if len(users) == 1 else None
    if len(target) != 4 or target[:2] != [0, 0] or not editing.is_op(transpose, "Transpose"):
        return None
    if tuple(transpose.attributes.get_ints("perm", ())) != _HEADS_FIRST:
        return None
    return target[2], target[3], transpose.outputs[0]
