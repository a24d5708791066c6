"""Every pass refuses a graph that its contract excludes, and a result that it does not promise."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lminf_export.errors import EngineError, ExportError
from lminf_export.export import passes
from lminf_export.export.passes import editing, pipelines
from lminf_export.export.passes.attach_attention_body import AttachAttentionBodyPass
from lminf_export.export.passes.attach_constants import AttachConstantsPass
from lminf_export.export.passes.attach_weights import AttachWeightsPass
from lminf_export.export.passes.checking import ensure_sound
from lminf_export.export.passes.choose_weights import choose_weights
from lminf_export.export.passes.constant_reshape_targets import ConstantReshapeTargetsPass
from lminf_export.export.passes.declare_inputs_and_outputs import DeclareInputsAndOutputsPass
from lminf_export.export.passes.describe_model import DescribeModelPass
from lminf_export.export.passes.detach_weights import DetachWeightsPass
from lminf_export.export.passes.expand_rms_norm import ExpandRmsNormPass
from lminf_export.export.passes.fold_constants import FoldConstantsPass
from lminf_export.export.passes.freeze_sizes import FreezeSizesPass
from lminf_export.export.passes.fuse_linear_operators import FuseLinearOperatorsPass
from lminf_export.export.passes.fuse_rms_norm import FuseRmsNormPass
from lminf_export.export.passes.keep_tokens_flat import KeepTokensFlatPass
from lminf_export.export.passes.linear_to_gemm import LinearToGemmPass
from lminf_export.export.passes.name_nodes import NameNodesPass
from lminf_export.export.passes.name_plugin_nodes import NamePluginNodesPass
from lminf_export.export.passes.number_names import NumberNamesPass
from lminf_export.export.passes.remove_attention_body import RemoveAttentionBodyPass
from lminf_export.export.passes.rename_initializers import RenameInitializersPass
from lminf_export.export.passes.repeat_layers import RepeatLayersPass
from lminf_export.export.passes.write_rings_linearly import WriteRingsLinearlyPass
from lminf_export.operator.attention_body import BodyFeatures, function_body
from lminf_export.operator.bindings import TensorSpec
from lminf_export.operator.contract import DOMAIN, KEY_BIAS_OP_TYPE, OP_TYPE
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.tensors.stored import PickledTensor, StoredTensor
from tests.support.small_graphs import HEADER, LINEAR, NORM, VIEW, parsed, toy

Pass = ir.passes.InPlacePass


@dataclass(frozen=True)
class Case:
    """A pass with a graph it takes, and how both go wrong.

    Attributes:
        made: makes the pass and the graph.
        excluded: makes a pass and a graph that its contract excludes, from those.
        instead: what a faulty pass does to the graph; nothing by default.
    """

    made: Callable[[], tuple[Pass, ir.Model]]
    excluded: Callable[[Pass, ir.Model], tuple[Pass, ir.Model]]
    instead: Callable[[ir.Model], object] = lambda model: None


ROWS = """
g (float[N, 6] x) => (float[N, 5] y)
<float[5, 6] w>
{
    y = Gemm <transB = 1> (x, w)
}"""
CONSTANTS_ALONE = """
g (float[N] x) => (float[N] y)
{
    a = Constant <value = float[1] {2.0}> ()
    b = Neg (a)
    y = Add (x, b)
}"""
FUSED_NORM = """
g (float[B, S, 6] x) => (float[B, S, 6] y)
<float[6] w>
{
    y = RMSNormalization <axis = -1, stash_type = 1> (x, w)
}"""
RING = """
g (float[B, 2, ring_8, 4] past, float[B, 2, S, 4] new, int64[B] at)
    => (float[B, 2, ring_8, 4] present)
{
    present = TensorScatter <axis = 2, mode = "circular"> (past, new, at)
}"""
RINGS = {"past": "present"}
WEIGHT = {"w": StoredTensor(Path("weights"), "F32", (5, 6), 0, 120)}
CONSTANTS = {"w": torch.zeros(5, 6), "b": torch.zeros(5)}
SPECS = (
    [TensorSpec("x", "float32", ("batch", "sequence", 6))],
    [TensorSpec("y", "float32", ("batch", "sequence", 5))],
)


def bare(text: str) -> ir.Model:
    """A graph whose weights have no data, as in a trace."""
    model = parsed(text)
    for value in model.graph.initializers.values():
        value.const_value = None
    return model


def with_gemm() -> ir.Model:
    model = bare(LINEAR)
    LinearToGemmPass()(model)
    RemoveUnusedNodesPass()(model)
    return model


def attention(op_type: str = OP_TYPE, *, body: bool = False) -> ir.Model:
    """A graph of one attention node between its caches."""
    ends = [
        [*("q", "k", "v", "past", "past.v", "past.sk", "past.sv"), *(f"x{i}" for i in range(10))],
        ["out", "present", "present.v", "present.sk", "present.sv"],
    ]
    inputs, outputs = (
        [ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in names]
        for names in ends
    )
    node = ir.Node(DOMAIN, op_type, inputs, outputs=outputs)
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports={"": 24, DOMAIN: 1})
    model = ir.Model(graph, ir_version=11)
    if body:
        editing.attach_function(model, function_body(BodyFeatures()))
    return model


def quantize(form: str) -> tuple[Pass, ir.Model]:
    model = with_gemm()
    config = QuantizeConfig("int4", block_size=32, form=form)
    source = PickledTensor(torch.zeros(5, 6))
    choices = choose_weights(model, {"w": ["w"]}, {"w": source}, config, "float32")
    assert [choice.name for choice in choices] == ["w"]
    (step,) = pipelines.quantized(choices, config)
    return step, model


def values(model: ir.Model) -> dict[str | None, ir.Value]:
    graph = model.graph
    found = (*graph.inputs, *graph.outputs, *graph.initializers.values())
    return {value.name: value for value in found}


def edit(change: Callable[[ir.Model], object]) -> Callable[[Pass, ir.Model], tuple[Pass, ir.Model]]:
    """Return the same pass on a changed graph."""

    def excluded(step: Pass, model: ir.Model) -> tuple[Pass, ir.Model]:
        change(model)
        return step, model

    return excluded


def shapeless(name: str) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        values(model)[name].shape = None

    return change


def renamed(old: str, new: str | None) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        values(model)[old].name = new

    return change


def with_data(*names: str) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        for name in names:
            value = model.graph.initializers[name]
            value.const_value = ir.tensor(np.zeros(value.shape.numpy(), np.float32), name=name)

    return change


def without_data(model: ir.Model) -> None:
    for value in model.graph.initializers.values():
        value.const_value = None


def large_constant(model: ir.Model) -> None:
    editing.declare_initializer(model.graph, "folded", ir.DataType.FLOAT, (512, 513))
    with_data("folded")(model)


def two_unknown(model: ir.Model) -> None:
    """Write a reshape target with two open dimensions."""
    reshape = next(node for node in model.graph if node.op_type == "Reshape")
    target = editing.ints(-1, -1, 2, 3)
    model.graph.insert_before(reshape, target)
    reshape.replace_input_with(1, target.outputs[0])


def flattened_again(model: ir.Model) -> None:
    """Flatten what was just unflattened."""
    target = editing.ints(-1, 5)
    flatten = ir.node("Reshape", [model.graph[-1].outputs[0], target.outputs[0]])
    model.graph.extend([target, flatten])
    model.graph.outputs.append(flatten.outputs[0])


def other_kind(model: ir.Model) -> None:
    model.graph[0].op_type = KEY_BIAS_OP_TYPE


def add_call(model: ir.Model) -> None:
    model.graph.append(ir.Node(DOMAIN, "Linear", [model.graph.inputs[0]]))


def other_axis(model: ir.Model) -> None:
    model.graph[0].attributes["axis"] = ir.AttrInt64("axis", 0)


def older(model: ir.Model) -> None:
    model.opset_imports[""] = 22


def body_back(model: ir.Model) -> None:
    editing.attach_function(model, function_body(BodyFeatures()))


CASES = [
    Case(lambda: (ConstantReshapeTargetsPass(), parsed(VIEW)), edit(shapeless("x")), two_unknown),
    Case(
        lambda: (FoldConstantsPass(), parsed(HEADER + CONSTANTS_ALONE)),
        edit(large_constant),
        large_constant,
    ),
    Case(lambda: (FuseRmsNormPass(), parsed(NORM)), edit(older)),
    Case(lambda: (LinearToGemmPass(), bare(LINEAR)), edit(shapeless("x"))),
    Case(
        lambda: (KeepTokensFlatPass(), with_gemm()),
        lambda step, _: (step, bare(LINEAR)),
        flattened_again,
    ),
    Case(lambda: (DetachWeightsPass(), parsed(LINEAR)), edit(shapeless("w"))),
    Case(
        lambda: (RenameInitializersPass({"w": "v"}), bare(LINEAR)),
        edit(lambda model: editing.rename_initializer(model.graph, "b", "v")),
    ),
    Case(lambda: quantize("matmul_nbits"), edit(shapeless("w"))),
    Case(lambda: quantize("qdq"), edit(shapeless("w"))),
    Case(lambda: (AttachWeightsPass(WEIGHT), bare(LINEAR)), edit(with_data("w"))),
    Case(lambda: (FuseLinearOperatorsPass(), parsed(HEADER + ROWS)), edit(without_data)),
    Case(lambda: (AttachConstantsPass(CONSTANTS), bare(LINEAR)), edit(shapeless("w"))),
    Case(lambda: (NumberNamesPass({"w"}), parsed(LINEAR)), edit(renamed("y", "x"))),
    Case(
        lambda: (DescribeModelPass({"a": "b"}), parsed(LINEAR)),
        lambda _, model: (DescribeModelPass({"a": 1}), model),
    ),
    Case(lambda: (AttachAttentionBodyPass(BodyFeatures()), attention()), edit(other_kind)),
    Case(
        lambda: (DeclareInputsAndOutputsPass(*SPECS), parsed(LINEAR)),
        edit(lambda model: model.graph.outputs.clear()),
    ),
    Case(
        lambda: (
            RepeatLayersPass("m.layers", (1,), [f"m.layers.{i}.w" for i in range(3)]),
            toy(2),
        ),
        lambda step, model: (RepeatLayersPass("m.layers", (0,), step.order), model),
    ),
    Case(lambda: (WriteRingsLinearlyPass(RINGS), parsed(HEADER + RING)), edit(add_call)),
    Case(
        lambda: (FreezeSizesPass({"ring_8": 8}, ("past", "present")), parsed(HEADER + RING)),
        edit(renamed("past", "other")),
    ),
    Case(lambda: (NameNodesPass(), parsed(LINEAR)), edit(renamed("y", None))),
    Case(lambda: (RemoveAttentionBodyPass(), attention(body=True)), edit(other_kind)),
    Case(lambda: (NamePluginNodesPass(RINGS, 1), attention()), edit(body_back)),
    Case(lambda: (ExpandRmsNormPass(), parsed(HEADER + FUSED_NORM)), edit(other_axis)),
]
NAMES = [type(case.made()[0]).__name__ for case in CASES]
each_pass = pytest.mark.parametrize("case", CASES, ids=NAMES)


@each_pass
def test_a_pass_takes_what_it_requires_and_leaves_what_it_ensures(case):
    step, model = case.made()
    assert step(model).modified


@each_pass
def test_a_graph_that_the_contract_excludes_is_refused_before_it_is_edited(case):
    step, model = case.excluded(*case.made())
    object.__setattr__(step, "call", lambda model: pytest.fail("the pass was run"))
    with pytest.raises(ir.passes.PreconditionError):
        step(model)


@each_pass
def test_a_pass_that_does_something_else_is_found_out(case):
    step, model = case.made()
    faulty = copy.copy(step)

    def call(model: ir.Model) -> ir.passes.PassResult:
        case.instead(model)
        return ir.passes.PassResult(model, modified=True)

    object.__setattr__(faulty, "call", call)
    with pytest.raises(ir.passes.PostconditionError):
        faulty(model)


def test_every_pass_states_and_executes_a_contract():
    found = set()
    for module in pkgutil.iter_modules(passes.__path__, passes.__name__ + "."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(value) and issubclass(value, ir.passes.PassBase):
                if value.__module__ != module.name:
                    continue
                found.add(name)
                assert name.endswith("Pass")
                assert issubclass(value, ir.passes.InPlacePass)
                assert {"requires", "call", "ensures"} <= vars(value).keys()
                assert "Requires:" in value.__doc__
                assert "Ensures:" in value.__doc__
    assert found == set(NAMES)


def test_what_a_user_can_cause_is_an_error_for_users_in_every_pipeline():
    model = bare(LINEAR)
    with pytest.raises(ExportError, match=r"constants without a value: w, b$"):
        pipelines.run(model, (AttachConstantsPass({}),))
    specs = [TensorSpec("z", "int64", ())], SPECS[1]
    with pytest.raises(ExportError, match=r"has 'x' of FLOAT where the contract has 'z' of int64"):
        pipelines.run(parsed(LINEAR), (DeclareInputsAndOutputsPass(*specs),))
    with pytest.raises(EngineError, match="writes 1 rings from input to output, its layers have 0"):
        pipelines.run(parsed(HEADER + RING), (WriteRingsLinearlyPass({}),))


def test_a_fused_operator_without_a_body_is_found_out():
    step, model = FuseLinearOperatorsPass(), parsed(HEADER + ROWS)
    step(model)
    model.functions.clear()
    with pytest.raises(ir.passes.PostconditionError, match="no body of Linear takes 2 inputs"):
        step.ensures(model)


def test_a_node_that_reads_what_comes_later_is_found_out():
    model = parsed(LINEAR)
    ensure_sound(model)
    last = model.graph[-1]
    model.graph.remove(last)
    model.graph.insert_before(model.graph[0], last)
    with pytest.raises(ir.passes.PostconditionError, match="m is read before it is made"):
        ensure_sound(model)


def test_a_loop_reads_what_is_around_it_and_its_own():
    text = (
        HEADER
        + """
g (float[N] x, int64 n, bool c) => (float[N] y)
{
    d = Neg (x)
    y = Loop (n, c, x) <body = b (int64 i, bool go, float[N] s) => (bool on, float[N] t) {
        on = Identity (go)
        t = Add (s, d)
    }>
}"""
    )
    ensure_sound(parsed(text))
