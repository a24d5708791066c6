"""A rewritten graph made faster where operators compute the same from the same weights."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from lminf_export.export.passes import editing
from lminf_export.rewriting.assembling import Assembled
from lminf_export.rewriting.layouts import are_of_tokens
from lminf_export.rewriting.recording import Recorder
from lminf_export.rewriting.rows import to_rows

_HEADS_FIRST = (0, 2, 1, 3)
_NORMS = ("SimplifiedLayerNormalization", "RMSNormalization")


def tune(model: ir.Model, known: Assembled) -> None:
    """Make a rewritten graph faster, in place.

    Args:
        model: the graph, before it has bodies of operators.
        known: what is known of its values.
    """
    graph = model.graph
    for node in list(graph):
        if editing.is_op(node, "Reshape"):
            _keep_heads(graph, node, known)
    for node in list(graph):
        if editing.is_op(node, "Split"):
            _split_heads(graph, node, known)
    to_rows(model, known.ids, known.shapes, [known.index])
    editing.eliminate_identities(model)
    common.RemoveUnusedNodesPass()(model)


def _keep_heads(graph: ir.Graph, last: ir.Node, known: Assembled) -> None:
    """Leave tokens in heads when a norm put them there already.

    x (B, S, E) → Reshape, norm of D, Reshape, Reshape to (0, 0, H, D) becomes Reshape to (0, 0, H,
    D), norm.
    """
    heads = editing.const_ints(last.inputs[1]) or []
    joined = _alone(last.inputs[0], "Reshape")
    norm = None if joined is None else _norm_before(joined)
    first = None if norm is None else _alone(norm.inputs[0], "Reshape")
    if norm is None or first is None or heads[:2] != [0, 0] or len(heads) != 4:
        return
    x, before = first.inputs[0], editing.const_ints(first.inputs[1]) or [0]
    if x is None or x not in known.shapes or before[-1] != heads[3] or heads[2] <= 0:
        return
    if not are_of_tokens(known.shapes[x], heads[2] * heads[3]):
        return
    op = Recorder()
    target = op.integers(*heads)
    graph.insert_before(first, op.nodes)
    first.replace_input_with(1, target)
    first.outputs[0].shape = norm.outputs[0].shape = None
    ir.convenience.replace_all_uses_with(last.outputs[0], norm.outputs[0])


def _norm_before(node: ir.Node) -> ir.Node | None:
    for kind in _NORMS:
        norm = _alone(node.inputs[0], kind)
        if norm is not None and norm.attributes.get_int("axis", -1) == -1:
            return norm
    return None


def _alone(value: ir.Value | None, kind: str) -> ir.Node | None:
    """Return the node of a kind that makes a value which nothing else reads."""
    node = editing.producer(value, kind)
    alone = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
    return node if alone else None


def _split_heads(graph: ir.Graph, split: ir.Node, known: Assembled) -> None:
    """Split queries, keys and values when they are heads already: one transposition for all.

    Split(x) → Reshape, Transpose of each part becomes Reshape, Transpose → Split of heads.
    """
    found = [_in_heads(part) for part in split.outputs]
    parts = [part for part in found if part is not None]
    x = split.inputs[0]
    if len(parts) != len(found) or len({dim for _, dim, _ in parts}) != 1 or x is None:
        return
    rank = len(known.shapes[x][0]) if x in known.shapes else 0
    if split.attributes.get_int("axis", 0) not in (-1, rank - 1):
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
