"""A foreign graph as it is read: functions inlined, sizes taken from the tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes import common

from lminf_export.bundle.links import stays_inside
from lminf_export.bundle.records import check_file_name
from lminf_export.disk import is_file
from lminf_export.errors import ModelError, shortened
from lminf_export.export.passes import editing
from lminf_export.operator.contract import DOMAIN
from lminf_export.rewriting.feeds import Inputs
from lminf_export.rewriting.whole_files import bytes_needed, check_graph_file, check_weight_file
from lminf_export.runtime.foreign_errors import foreign_errors


def read_graph(path: Path) -> ir.Model:
    """Read a graph; weights stay in their files.

    Raises:
        ModelError: it cannot be read, or is one of this package already.
    """
    check_graph_file(path)
    try:
        with _quiet():
            model = ir.load(path)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except DecodeError as error:
        raise ModelError(f"{path} is not an ONNX model: {error}") from error
    except ir.serde.SerdeError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ModelError(f"{path} is damaged: {shortened(reason, 140)}") from error
    _check_names(model, path)
    _check_weights(model, path)
    if any(node.domain == DOMAIN for node in model.graph):
        raise ModelError(
            f"{path} attends through {DOMAIN} already: it was written by lminf-export; export the "
            f"model that it was made of"
        )
    for step in (
        common.ClearMetadataAndDocStringPass(),
        common.InlinePass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        editing.eliminate_identities,
        common.RemoveUnusedNodesPass(),
    ):
        step(model)
    return model


def _check_names(model: ir.Model, path: Path) -> None:
    """Refuse a graph in which a name is no text: protobuf's libraries read it, and write it not."""
    nodes = list(model.graph.all_nodes())
    names = [name for node in nodes for name in (node.name, node.op_type, node.domain)]
    names += [value.name for node in nodes for value in node.outputs]
    if not all(name is None or isinstance(name, str) for name in names):
        raise ModelError(f"{path} is damaged: a name in it is no text; copy the model again")


def _check_weights(model: ir.Model, path: Path) -> None:
    """Check that weights in other files are in plain, whole ones in the graph's own folder.

    Whoever packed the graph chose the names, and what is read there becomes part of a bundle.

    Raises:
        ModelError: naming a file that is missing, elsewhere or shorter than the graph says.
    """
    for location, needed in sorted(bytes_needed(model).items()):
        shown = shortened(repr(location), 60)
        try:
            check_file_name(location)
        except ValueError:
            raise ModelError(
                f"the graph's weights are in {shown}, which is not a plain name in its folder"
            ) from None
        file = path.parent / location
        if not is_file(file):
            raise ModelError(f"the graph's weights {shown} are missing; copy the whole model")
        if not stays_inside(file, path.parent):
            raise ModelError(
                f"the graph's weights {shown} are a link to outside of its folder, which is not "
                f"followed; put the file itself there"
            )
        check_weight_file(file, needed)


def following(path: Path) -> AbstractContextManager[None]:
    """Return a block in which a graph is followed: what cannot be ends in one line.

    A graph may break any rule that the code relies on, and still be read.
    """
    return foreign_errors(
        ModelError,
        f"{path} is damaged, or of a form that rewriting does not know (where "
        f"onnx.checker.check_model finds no fault, please report it)",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence onnx_ir about names that nothing gives: what needs one of them is refused."""
    logger = logging.getLogger("onnx_ir")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def take_sizes_from_tokens(graph: ir.Graph, inputs: Inputs) -> None:
    """Let nodes that ask an input for the size of the batch, or of the step, ask the tokens.

    Exporters ask whichever input comes first, a cache or the mask. Those go, and their sizes are
    no positions: the first dimension of every input is the batch, the second of positions the
    step.
    """
    for value, role in inputs.roles.items():
        if role == "ids":
            continue
        known = {0: 0} if role != "cache_positions" else {0: 1}
        if role == "positions":
            known = {0: 0, 1: 1}
        for use, _ in list(value.uses()):
            if editing.is_op(use, "Shape") and use.graph is graph:
                _retarget(graph, use, inputs.ids, value, known)


def _retarget(
    graph: ir.Graph, node: ir.Node, ids: ir.Value, value: ir.Value, known: dict[int, int]
) -> None:
    rank = len(value.shape) if value.shape is not None else 0
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", rank)
    if end - start == 1:
        new = _size(graph, node, value, start, ids, known, as_list=True)
        if new is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], new)
        return
    for use, _ in list(node.outputs[0].uses()):
        if not editing.is_op(use, "Gather") or use.attributes.get_int("axis", 0) != 0:
            continue
        if use.graph is not graph:
            continue
        index = use.inputs[1]
        tensor = None if index is None else ir.convenience.get_const_tensor(index)
        if tensor is None or tensor.size != 1:
            continue
        place = start + int(tensor.numpy().item()) % (end - start)
        new = _size(graph, use, value, place, ids, known, as_list=len(tensor.shape) == 1)
        if new is not None:
            ir.convenience.replace_all_uses_with(use.outputs[0], new)


def _size(
    graph: ir.Graph,
    before: ir.Node,
    value: ir.Value,
    axis: int,
    ids: ir.Value,
    known: dict[int, int],
    *,
    as_list: bool,
) -> ir.Value | None:
    """Return a size as a list of one number, or as a number; None if it is none of the tokens."""
    fixed = value.shape[axis] if value.shape is not None else None
    if axis in known:
        place = known[axis]
        shape = ir.node("Shape", [ids], {"start": place, "end": place + 1})
        nodes = [shape]
    elif isinstance(fixed, int):
        nodes = [editing.ints(fixed)]
    else:
        return None
    if not as_list:
        axis_0 = editing.ints(0)
        nodes += [axis_0, ir.node("Squeeze", [nodes[0].outputs[0], axis_0.outputs[0]])]
    graph.insert_before(before, nodes)
    return nodes[-1].outputs[0]
