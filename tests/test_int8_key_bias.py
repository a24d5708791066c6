"""Rings of int8 that keep a bias of keys out: the specification, body and kernels against it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from benchmarks.support.operator_case import Case, History, shared_inputs
from benchmarks.support.operator_node import OnnxNode
from lminf_export.operator import contract, torch_operator
from lminf_export.operator.attention_body import BodyFeatures, function_body
from lminf_export.operator.reference_int8 import (
    lambda_attention_int8_cache,
    round_to_int8,
)
from lminf_export.runtime.kernels import INSTALLED
from tests.support.int8_streams import (
    ExactHistory,
    behind_scales,
    exact_inputs,
    follow,
    follow_far_and_near,
    follow_large,
    rounded_caches,
)
from tests.support.kernel_sets import SETS, instruction_set
from tests.support.operator_streams import BASES, CASES, TOLERANCE, cases, random_chunks, total

FORMS = ("body", *SETS)
BIAS = 300.0
# Logits are the sums of two large products, rounded in float32.
BIAS_TOLERANCE = TOLERANCE + BIAS * 4 * torch.finfo(torch.float32).eps


@pytest.fixture(params=FORMS)
def node(request):
    """Makes a node of a case: its function body, or the kernel on one instruction set."""
    form = partial(OnnxNode, int8_cache=True, key_bias=True)
    if request.param == "body":
        yield form
        return
    with instruction_set(request.param):
        yield partial(form, kernels=INSTALLED)


@pytest.mark.parametrize("name", CASES)
def test_reference_ring_equals_distances(name):
    case = CASES[name].with_(key_bias=BIAS)
    for base in BASES:
        chunks = random_chunks(case, rows=3, steps=16, seed=base % 97)
        bases = [base, base + 5, base + 131 if base else 0]
        history = ExactHistory(case, bases, total(chunks), torch.float64)
        wanted = history.oracle(round_to_int8)
        past = torch.tensor(bases)
        caches, scales = rounded_caches(history, case.capacity)
        behind = behind_scales(case, torch.float64)
        for new_lengths in chunks:
            new, width = torch.tensor(new_lengths), max(new_lengths)
            shared = exact_inputs(case, past, new, width, case.capacity)
            inputs = [*history.chunk(past, new, width), *caches, *shared, *scales, *behind]
            output, *present = lambda_attention_int8_cache(*inputs, **case.attributes())
            caches, scales = present[:4], present[4:]
            for row in range(3):
                count, start = new_lengths[row], int(past[row]) - bases[row]
                right = wanted[row, :, start : start + count]
                torch.testing.assert_close(output[row, :, :count], right, rtol=0, atol=1e-6)
            past = past + new


def test_rounding_costs_about_the_same_with_a_bias_as_without():
    errors = {}
    for norm in (0.0, 300.0, 900.0):
        case = Case(head_dim=64, rotary_dim=64, window_size=97, key_bias=norm, theta=1e6)
        history = ExactHistory(case, [0], 200, torch.float64)
        rounded, exact = history.oracle(round_to_int8), history.oracle()
        errors[norm] = float((rounded - exact).abs().mean())
        if norm:
            kept = history.with_bias_in_the_ring().oracle(round_to_int8)
            assert float((kept - exact).abs().mean()) > 5 * errors[norm]
    # Attention over biased keys is sharper, so it answers the same rounding with more.
    assert errors[300.0] < 4 * errors[0.0]
    assert errors[900.0] < 4 * errors[0.0]


@pytest.mark.parametrize("name", CASES)
def test_every_form_follows_the_specification(name, node):
    error, ties = follow_far_and_near(node, CASES[name].with_(key_bias=BIAS))
    assert error < BIAS_TOLERANCE
    assert ties <= 1e-2


@pytest.mark.parametrize(
    ("case", "steps"),
    [
        # Blocks of 32 keys and digits of positions end within a tile; sizes no vector divides.
        (Case(window_size=607, chunk_size=131, head_dim=32, rotary_dim=32, key_bias=BIAS), 5),
        (Case(window_size=293, chunk_size=67, head_dim=86, rotary_dim=20, key_bias=BIAS), 5),
        (Case(window_size=1500, chunk_size=5, head_dim=48, rotary_dim=16, key_bias=BIAS), 4),
    ],
    ids=["long_window", "odd_head_dim", "decoding"],
)
def test_large_cases_follow_the_specification(case, steps, node):
    assert follow_large(node, case, steps, [2047, 10**9]) < BIAS_TOLERANCE


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases, base=st.sampled_from(BASES), in_place=st.booleans(), seed=st.integers(0, 999))
def test_any_case_follows_the_specification(case, base, in_place, seed):
    case = case.with_(key_bias=BIAS)
    chunks = random_chunks(case, rows=2, steps=6, seed=seed)
    history = History(case, [base, base + seed], total(chunks), torch.float32)
    for kernels in (None, INSTALLED if INSTALLED.is_file() else None):
        form = OnnxNode(case, in_place=in_place, kernels=kernels, int8_cache=True, key_bias=True)
        assert follow(form, case, history, chunks)[0] < BIAS_TOLERANCE


@pytest.mark.parametrize("name", ["plain", "interleaved", "no_sinks", "more_sinks_than_window"])
def test_half_precision_follows_the_specification(name, node):
    # In float16 a key of size 300 has 0.25 between neighbours: a bias that its keys can hold.
    case = CASES[name].with_(key_bias=30.0)
    chunks = random_chunks(case, rows=3, steps=16, seed=3)
    history = History(case, [0, 10**6, 131], total(chunks), torch.float16)
    error, _ = follow(node(case, TensorProto.FLOAT16, in_place=True), case, history, chunks)
    assert error < 16 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("name", ["plain", "no_sinks"])
def test_torch_op_passes_opcheck(name):
    case = CASES[name].with_(key_bias=BIAS)
    history = History(case, [3, 0], 5, torch.float32)
    past, new = torch.tensor(history.bases), torch.tensor([5, 4])
    caches, scales = rounded_caches(history, case.capacity)
    shared = shared_inputs(case, past, new, 5, case.capacity)
    inputs = (*history.chunk(past, new, 5), *caches, *shared, *scales, *behind_scales(case))
    operator = torch_operator.lambda_attention_int8_cache
    torch.library.opcheck(operator, inputs, case.attributes())


def test_the_old_ring_is_read_by_nothing_but_the_write():
    function = function_body(BodyFeatures(int8_cache=True, key_bias=True))
    for past in ("past_key", "past_value", *(x.name for x in contract.SCALE_INPUTS)):
        readers = [node.op_type for node in function.node if past in node.input]
        assert readers == ["TensorScatter"]


@pytest.mark.skipif(not INSTALLED.is_file(), reason="no C++ compiler, no kernels were built")
def test_a_table_of_a_wrong_shape_ends_the_step_in_words():
    case = CASES["plain"].with_(key_bias=BIAS)
    history = History(case, [5], 2, torch.float32)
    past, new = torch.tensor([5]), torch.tensor([2])
    caches, scales = rounded_caches(history, case.capacity)
    shared = shared_inputs(case, past, new, 2, case.capacity)
    bias, cos, sin = behind_scales(case)
    form = OnnxNode(case, kernels=INSTALLED, int8_cache=True, key_bias=True)
    inputs = [*history.chunk(past, new, 2), *caches, *shared, *scales, bias, cos[1:].clone(), sin]
    with pytest.raises(Exception, match=r"cos_table has shape \(4095, 4\), expected \(4096, 4\)"):
        form(case, inputs)
