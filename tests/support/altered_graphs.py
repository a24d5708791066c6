"""Foreign graphs changed on purpose, so that they must be refused."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Graph = onnx.GraphProto


def rename(model: ModelProto, old: str, new: str) -> None:
    """Give an input or output, and all that read it, another name."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name == old:
            value.name = new
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new


def add_input(model: ModelProto, name: str, kind: int, shape: list[int | str | None]) -> None:
    """Add an input that nothing reads."""
    model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))


def input_of(model: ModelProto, name: str) -> onnx.ValueInfoProto:
    """Return an input."""
    return next(value for value in model.graph.input if value.name == name)


def nodes(model: ModelProto, op_type: str) -> list[NodeProto]:
    """Return the nodes of an operator, in order."""
    return [node for node in model.graph.node if node.op_type == op_type]


def producer(model: ModelProto, value: str) -> NodeProto:
    """Return the node that makes a value."""
    return next(node for node in model.graph.node if value in node.output)


def constant(model: ModelProto, name: str, array: object, dtype: object = np.float32) -> str:
    """Add an initializer; return its name."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(array, dtype), name))
    return name


def insert_before(model: ModelProto, node: NodeProto, new: list[NodeProto]) -> None:
    """Put nodes in front of another."""
    place = list(model.graph.node).index(node)
    for offset, one in enumerate(new):
        model.graph.node.insert(place + offset, one)


def add_to_scores(model: ModelProto, new: list[NodeProto], bias: str, layers: int = 9) -> None:
    """Add a value that some nodes compute to the scores of the first layers' attentions."""
    insert_before(model, model.graph.node[0], new)
    for number, softmax in enumerate(nodes(model, "Softmax")[:layers]):
        changed = helper.make_node("Add", [softmax.input[0], bias], [f"changed_{number}"])
        insert_before(model, softmax, [changed])
        softmax.input[0] = f"changed_{number}"


def bias_of_places(model: ModelProto) -> None:
    """Add the root of each key's place to the scores: no bias of the distance."""
    axes = constant(model, "axes", [1, 2], np.int64)
    one = constant(model, "one", 1, np.int64)
    new = [
        helper.make_node("Cast", ["attention_mask"], ["mask_int"], to=TensorProto.INT64),
        helper.make_node("CumSum", ["mask_int", one], ["places"]),
        helper.make_node("Cast", ["places"], ["places_float"], to=TensorProto.FLOAT),
        helper.make_node("Sqrt", ["places_float"], ["roots"]),
        helper.make_node("Unsqueeze", ["roots", axes], ["bias"]),
    ]
    add_to_scores(model, new, "bias")


def bias_of_words(model: ModelProto) -> None:
    """Multiply the scores of even tokens: what they attend to depends on which tokens they are."""
    zero = constant(model, "zero", 0, np.int64)
    two = constant(model, "two", 2, np.int64)
    axes = constant(model, "axes", [1, 3], np.int64)
    factor = constant(model, "factor", 3.0)
    new = [
        helper.make_node("Mod", ["input_ids", two], ["odd"]),
        helper.make_node("Equal", ["odd", zero], ["is_even"]),
        helper.make_node("Cast", ["is_even"], ["even"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["even", factor], ["more"]),
        helper.make_node("Unsqueeze", ["more", axes], ["bias"]),
        helper.make_node("Exp", ["bias"], ["sharper"]),
    ]
    insert_before(model, model.graph.node[0], new)
    for number, softmax in enumerate(nodes(model, "Softmax")):
        changed = helper.make_node("Mul", [softmax.input[0], "sharper"], [f"changed_{number}"])
        insert_before(model, softmax, [changed])
        softmax.input[0] = f"changed_{number}"


def without_mask(model: ModelProto) -> None:
    """Let attention see later tokens."""
    for softmax in nodes(model, "Softmax"):
        softmax.input[0] = producer(model, softmax.input[0]).input[0]


def cube_scores(model: ModelProto) -> None:
    """Attend by the third power of the products."""
    three = constant(model, "three", 3.0)
    for number, softmax in enumerate(nodes(model, "Softmax")):
        add = producer(model, softmax.input[0])
        cubed = helper.make_node("Pow", [add.input[0], three], [f"cubed_{number}"])
        insert_before(model, add, [cubed])
        add.input[0] = f"cubed_{number}"


def cap_first_layer(model: ModelProto) -> None:
    """Cap the logits of one layer of two."""
    cap = constant(model, "cap", 2.0)
    add = producer(model, nodes(model, "Softmax")[0].input[0])
    new = [
        helper.make_node("Div", [add.input[0], cap], ["part"]),
        helper.make_node("Tanh", ["part"], ["tanh"]),
        helper.make_node("Mul", ["tanh", cap], ["capped"]),
    ]
    insert_before(model, add, new)
    add.input[0] = "capped"


def stretch_keys(model: ModelProto) -> None:
    """Make keys longer with their place."""
    axes = constant(model, "axes", [1, 3], np.int64)
    one = constant(model, "one", 1.0)
    concat = producer(model, "present.0.key")
    new = [
        helper.make_node("Cast", ["position_ids"], ["places"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["places", one], ["lengths"]),
        helper.make_node("Unsqueeze", ["lengths", axes], ["factors"]),
        helper.make_node("Mul", [concat.input[1], "factors"], ["stretched"]),
    ]
    insert_before(model, concat, new)
    concat.input[1] = "stretched"


def positions_after_attention(model: ModelProto) -> None:
    """Add positions to the logits."""
    axes = constant(model, "axes", [2], np.int64)
    rename(model, "logits", "plain_logits")
    new = [
        helper.make_node("Cast", ["position_ids"], ["places"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["places", axes], ["columns"]),
        helper.make_node("Add", ["plain_logits", "columns"], ["logits"], name="late"),
    ]
    model.graph.node.extend(new)
    for value in model.graph.output:
        if value.name == "plain_logits":
            value.name = "logits"


def share_a_cache(model: ModelProto) -> None:
    """Let the second layer read the first one's keys."""
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "past_key_values.1.key":
                node.input[place] = "past_key_values.0.key"
    model.graph.input.remove(input_of(model, "past_key_values.1.key"))


def embedding_alone(model: ModelProto) -> None:
    """Leave nothing of a model but its embedding and head: it attends nowhere."""
    graph = model.graph
    table = constant(model, "table", np.ones((64, 4)))
    head = constant(model, "head", np.ones((4, 64)))
    inputs = [input_of(model, "input_ids")]
    outputs = [value for value in graph.output if value.name == "logits"]
    kept = helper.make_graph(
        [
            helper.make_node("Gather", [table, "input_ids"], ["rows"]),
            helper.make_node("MatMul", ["rows", head], ["logits"]),
        ],
        "alone",
        inputs,
        outputs,
        [t for t in graph.initializer if t.name in (table, head)],
    )
    graph.CopyFrom(kept)


def leave_open(model: ModelProto, name: str, place: int, word: str) -> None:
    """Leave one size of an input open."""
    size = input_of(model, name).type.tensor_type.shape.dim[place]
    size.Clear()
    size.dim_param = word


def _distances(model: ModelProto) -> list[NodeProto]:
    """Return nodes that compute "distance" (B, 1, S, T), queries' places less those of keys."""
    rows, columns = (
        constant(model, name, axes, np.int64) for name, axes in (("rows", [1, 3]), ("cols", [1, 2]))
    )
    one = constant(model, "one", 1, np.int64)
    return [
        helper.make_node("Cast", ["attention_mask"], ["mask_int"], to=TensorProto.INT64),
        helper.make_node("CumSum", ["mask_int", one], ["counts"]),
        helper.make_node("Sub", ["counts", one], ["places"]),
        helper.make_node("Unsqueeze", ["position_ids", rows], ["queries"]),
        helper.make_node("Unsqueeze", ["places", columns], ["keys"]),
        helper.make_node("Sub", ["queries", "keys"], ["distance"]),
    ]


def _hide(model: ModelProto, new: list[NodeProto], hidden: str) -> None:
    """Hide the keys whose entry is not zero, by a large negative score."""
    low = constant(model, "low", -1e9)
    new = [
        *_distances(model),
        *new,
        helper.make_node("Cast", [hidden], ["hidden_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["hidden_float", low], ["bias"]),
    ]
    add_to_scores(model, new, "bias")


def hide_itself(model: ModelProto) -> None:
    """Hide each token from itself."""
    zero = constant(model, "zero", 0, np.int64)
    _hide(model, [helper.make_node("Equal", ["distance", zero], ["hidden"])], "hidden")


def hide_every_other(model: ModelProto) -> None:
    """Hide all tokens at odd distances."""
    two = constant(model, "two", 2, np.int64)
    _hide(model, [helper.make_node("Mod", ["distance", two], ["hidden"])], "hidden")


def sharpen_late_queries(model: ModelProto) -> None:
    """Multiply scores by a number that grows with every 64 places of the query."""
    rows, slow = constant(model, "rows", [1, 3], np.int64), constant(model, "slow", 1 / 64)
    unit = constant(model, "unit", 1.0)
    new = [
        helper.make_node("Cast", ["position_ids"], ["places"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["places", slow], ["steps"]),
        helper.make_node("Floor", ["steps"], ["growth"]),
        helper.make_node("Add", ["growth", unit], ["factors"]),
        helper.make_node("Unsqueeze", ["factors", rows], ["factor"]),
    ]
    insert_before(model, model.graph.node[0], new)
    for number, softmax in enumerate(nodes(model, "Softmax")):
        add = producer(model, softmax.input[0])
        changed = helper.make_node("Mul", [add.input[0], "factor"], [f"changed_{number}"])
        insert_before(model, add, [changed])
        add.input[0] = f"changed_{number}"


def two_products(model: ModelProto) -> None:
    """Add a second product of the same queries and keys to the scores."""
    for number, softmax in enumerate(nodes(model, "Softmax")):
        add = producer(model, softmax.input[0])
        product = next(n for n in model.graph.node if n.output[0] == add.input[0])
        second = helper.make_node("MatMul", list(product.input), [f"second_{number}"])
        both = helper.make_node("Add", [add.input[0], second.output[0]], [f"both_{number}"])
        insert_before(model, add, [second, both])
        add.input[0] = f"both_{number}"


def bend_scores(model: ModelProto) -> None:
    """Add the sine of the scores to them: a curve that is no soft cap."""
    for number, softmax in enumerate(nodes(model, "Softmax")):
        add = producer(model, softmax.input[0])
        sine = helper.make_node("Sin", [add.input[0]], [f"sine_{number}"])
        bent = helper.make_node("Add", [add.input[0], sine.output[0]], [f"bent_{number}"])
        insert_before(model, add, [sine, bent])
        add.input[0] = f"bent_{number}"


def keep_last_logits(model: ModelProto) -> None:
    """Compute logits of as many last tokens as an input asks for, as exports for browsers do."""
    add_input(model, "num_logits_to_keep", TensorProto.INT64, [])
    head = producer(model, "logits")
    axes = constant(model, "keep_axes", [1], np.int64)
    zero = constant(model, "keep_zero", [0], np.int64)
    end = constant(model, "keep_end", [2**63 - 1], np.int64)
    new = [
        helper.make_node("Neg", ["num_logits_to_keep"], ["keep_start"]),
        helper.make_node("Unsqueeze", ["keep_start", zero], ["keep_starts"]),
        helper.make_node("Slice", [head.input[0], "keep_starts", end, axes], ["kept"]),
    ]
    insert_before(model, head, new)
    head.input[0] = "kept"
