"""A bundle's graph with a state that a server can carry: lengths included, and a reset.

The bare graph takes lengths, and where its logits are wanted, from its caller. Triton's implicit
state knows none of that: it hands the outputs of one request of a sequence to the next as inputs,
and tells when a sequence begins. So a few nodes are put before the graph:

    past = 0 where START, else state_length
    S is at most a chunk, or the request fails: longer ones would overwrite keys in use
    new_length = S where READY, else 0
    logits of the last new token
    present_length = past + new_length

Caches need no reset: what lies behind a stream's length has no weight, whatever finite numbers
it holds.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from lminf_export.bundle.folder import Bundle
from lminf_export.errors import InputError
from lminf_export.operator.bindings import (
    BATCH,
    INPUT_IDS,
    LOGITS_INDEX,
    NEW_LENGTH,
    PAST_LENGTH,
)

START, READY = "START", "READY"
STATE_LENGTH, PRESENT_LENGTH = "state_length", "present_length"
_PREFIX = "lminf_state/"
_ZERO, _ONE, _AXIS = _PREFIX + "zero", _PREFIX + "one", _PREFIX + "axis"
_LENGTHS = _PREFIX + "lengths"


def implicit_state_graph(bundle: Bundle) -> onnx.ModelProto:
    """Return a bundle's graph whose state includes the lengths.

    Inputs: `input_ids` (B, S) int64, 1 ≤ S ≤ chunk size; `START` and `READY` (B, 1) bool;
    `state_length` (B, 1) int64; the caches. Outputs: `logits` (B, 1, V) of each row's last token,
    `present_length` (B, 1) int64; the caches. Every row that is ready has S new tokens. Weights
    are looked for beside the graph's file, under the names they have in the bundle.

    Raises:
        InputError: the graph lacks an input of a bundle's.
    """
    chunk_size = bundle.manifest.lambda_config.chunk_size
    model = onnx.load(bundle.graph_path, load_external_data=False)
    graph = model.graph
    own = {PAST_LENGTH, NEW_LENGTH, LOGITS_INDEX}
    names = [value.name for value in graph.input]
    if not own.issubset(names):
        raise InputError(f"{bundle.graph_path} has no inputs {', '.join(sorted(own - set(names)))}")
    for value in [value for value in graph.input if value.name in own]:
        graph.input.remove(value)
    flag = (BATCH, 1)
    graph.input.extend(
        (
            helper.make_tensor_value_info(START, TensorProto.BOOL, flag),
            helper.make_tensor_value_info(READY, TensorProto.BOOL, flag),
            helper.make_tensor_value_info(STATE_LENGTH, TensorProto.INT64, flag),
        )
    )
    graph.output.append(helper.make_tensor_value_info(PRESENT_LENGTH, TensorProto.INT64, flag))
    graph.initializer.extend(
        helper.make_tensor(name, TensorProto.INT64, dims, (value,))
        for name, dims, value in ((_ZERO, (), 0), (_ONE, (), 1), (_AXIS, (1,), 1))
    )
    lengths = range(chunk_size + 1)
    graph.initializer.append(
        helper.make_tensor(_LENGTHS, TensorProto.INT64, (len(lengths),), lengths)
    )
    nodes = [*_nodes(chunk_size), *graph.node]  # in the order in which they run
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def write_implicit_state(bundle: Bundle, path: Path) -> None:
    """Write the graph to a file; the bundle's files of weights are to stand beside it.

    Raises:
        InputError: see `implicit_state_graph`.
        OSError: it cannot be written.
    """
    onnx.save(implicit_state_graph(bundle), path)


def _nodes(chunk_size: int) -> list[onnx.NodeProto]:
    """Return what makes the bare graph's inputs out of the state's."""
    names = ("past", "given", "length", "new", "latest")
    past, given, length, new, latest = (_PREFIX + name for name in names)
    steps = (
        ("Where", (START, _ZERO, STATE_LENGTH), past),
        ("Squeeze", (past, _AXIS), PAST_LENGTH),
        ("Shape", (INPUT_IDS,), given),
        # Its name is in the error of a request that has more: no such length is in the table.
        ("Gather", (_LENGTHS, given), length),
        ("Where", (READY, length, _ZERO), new),
        ("Squeeze", (new, _AXIS), NEW_LENGTH),
        ("Sub", (new, _ONE), latest),
        ("Max", (latest, _ZERO), LOGITS_INDEX),
        ("Add", (past, new), PRESENT_LENGTH),
    )
    nodes = [
        helper.make_node(kind, inputs, [output], name=f"{_PREFIX}{kind}_{place}")
        for place, (kind, inputs, output) in enumerate(steps)
    ]
    nodes[3].name = f"{_PREFIX}at_most_{chunk_size}_new_tokens"
    # S, the second of the input's dimensions.
    nodes[2].attribute.extend((helper.make_attribute("start", 1), helper.make_attribute("end", 2)))
    return nodes
