"""Rings of int8: the specification against distances, body and kernel against the specification."""

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
    dequantize,
    lambda_attention_int8_cache,
    quantize,
    round_to_int8,
)
from lminf_export.runtime.kernels import INSTALLED
from tests.support.int8_streams import (
    ExactHistory,
    exact_inputs,
    follow,
    follow_far_and_near,
    follow_large,
    rounded_caches,
)
from tests.support.kernel_sets import SETS, instruction_set
from tests.support.operator_streams import BASES, CASES, TOLERANCE, cases, random_chunks, total

FORMS = ("body", *SETS)


@pytest.fixture(params=FORMS)
def node(request):
    """Makes a node of a case: its function body, or the kernel on one instruction set."""
    if request.param == "body":
        yield partial(OnnxNode, int8_cache=True)
        return
    with instruction_set(request.param):
        yield partial(OnnxNode, int8_cache=True, kernels=INSTALLED)


def test_rounding_takes_ties_to_even_and_the_largest_to_127():
    rows = torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.5], [-254.0, 1.0, 3.0, -5.0, 0.0]])
    q, scale = quantize(rows)
    assert scale.tolist() == [[1.0], [2.0]]
    assert q.tolist() == [[127, 0, 2, -2, -126], [-127, 0, 2, -2, 0]]
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32


@pytest.mark.parametrize("x", [0.0, 1e-45, 3e-44, 2e-43, 1e-38, 3e38])
def test_rounding_stays_finite_at_the_ends_of_float32(x):
    q, scale = quantize(torch.tensor([[x, -x]]))
    assert q[0, 0] == -q[0, 1]
    assert dequantize(q, scale).isfinite().all()
    if x >= 1e-38:
        assert q.tolist() == [[127, -127]]


def test_rounding_errs_by_half_a_step():
    x = torch.randn(5, 3, 977, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, scale = quantize(x)
    error = ((round_to_int8(x) - x) / scale).abs()
    assert 0.49 < error.max() <= 0.5


@pytest.mark.parametrize("name", CASES)
def test_reference_ring_equals_distances(name):
    case = CASES[name]
    for base in BASES:
        chunks = random_chunks(case, rows=3, steps=16, seed=base % 97)
        bases = [base, base + 5, base + 131 if base else 0]
        history = ExactHistory(case, bases, total(chunks), torch.float64)
        wanted = history.oracle(round_to_int8)
        past = torch.tensor(bases)
        caches, scales = rounded_caches(history, case.capacity)
        for new_lengths in chunks:
            new, width = torch.tensor(new_lengths), max(new_lengths)
            inputs = [
                *history.chunk(past, new, width),
                *caches,
                *exact_inputs(case, past, new, width, case.capacity),
                *scales,
            ]
            output, *present = lambda_attention_int8_cache(*inputs, **case.attributes())
            caches, scales = present[:4], present[4:]
            assert caches[0].dtype == caches[1].dtype == torch.int8
            for row in range(3):
                count, start = new_lengths[row], int(past[row]) - bases[row]
                right = wanted[row, :, start : start + count]
                # Sums in another order; the smallest float32 slope and logit are exact.
                torch.testing.assert_close(output[row, :, :count], right, rtol=0, atol=1e-7)
            past = past + new


def test_the_result_does_not_depend_on_how_a_text_is_cut():
    case = CASES["plain"]
    found = []
    for sizes in ([1] * 77, [7] * 11, [3, 4, 5, 2] * 6):
        sizes = sizes[: next(i for i in range(len(sizes) + 1) if sum(sizes[:i]) >= 70)]
        history = ExactHistory(case, [0], 77, torch.float64)
        caches, scales = rounded_caches(history, case.capacity)
        past, outputs = torch.zeros(1, dtype=torch.int64), []
        for size in sizes:
            new = torch.tensor([size])
            shared = exact_inputs(case, past, new, size, case.capacity)
            inputs = [*history.chunk(past, new, size), *caches, *shared, *scales]
            output, *present = lambda_attention_int8_cache(*inputs, **case.attributes())
            caches, scales = present[:4], present[4:]
            outputs.append(output)
            past = past + new
        found.append(torch.cat(outputs, dim=2)[:, :, :70])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_every_form_follows_the_specification(name, node):
    error, ties = follow_far_and_near(node, CASES[name])
    assert error < TOLERANCE
    assert ties <= 1e-3


@pytest.mark.parametrize(
    ("case", "steps"),
    [
        # Several tiles and split keys; transposed tiles; sizes no vector divides.
        (Case(window_size=607, chunk_size=131, head_dim=32, rotary_dim=32), 5),
        (Case(window_size=293, chunk_size=67, head_dim=86, rotary_dim=20), 5),
        (Case(window_size=83, num_sink_tokens=271, chunk_size=101, head_dim=16), 4),
    ],
    ids=["long_window", "odd_head_dim", "many_sinks"],
)
def test_large_cases_follow_the_specification(case, steps, node):
    assert follow_large(node, case, steps, [0, 10**9]) < TOLERANCE


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases, base=st.sampled_from(BASES), in_place=st.booleans(), seed=st.integers(0, 999))
def test_any_case_follows_the_specification(case, base, in_place, seed):
    chunks = random_chunks(case, rows=2, steps=6, seed=seed)
    history = History(case, [base, base + seed], total(chunks), torch.float32)
    for kernels in (None, INSTALLED if INSTALLED.is_file() else None):
        form = OnnxNode(case, in_place=in_place, kernels=kernels, int8_cache=True)
        assert follow(form, case, history, chunks)[0] < TOLERANCE


@pytest.mark.parametrize("name", ["plain", "interleaved", "no_sinks", "more_sinks_than_window"])
def test_half_precision_follows_the_specification(name, node):
    case = CASES[name]
    chunks = random_chunks(case, rows=3, steps=16, seed=3)
    history = History(case, [0, 10**6, 131], total(chunks), torch.float16)
    error, _ = follow(node(case, TensorProto.FLOAT16, in_place=True), case, history, chunks)
    # The output's own rounding, and that of the body's products with sinks, of values up to 8.
    assert error < 8 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("name", ["plain", "no_sinks"])
def test_torch_op_passes_opcheck(name):
    case = CASES[name]
    history = History(case, [3, 0], 5, torch.float32)
    past, new = torch.tensor(history.bases), torch.tensor([5, 4])
    caches, scales = rounded_caches(history, case.capacity)
    shared = shared_inputs(case, past, new, 5, case.capacity)
    inputs = (*history.chunk(past, new, 5), *caches, *shared, *scales)
    torch.library.opcheck(torch_operator.lambda_attention_int8_cache, inputs, case.attributes())


def test_the_old_ring_is_read_by_nothing_but_the_write():
    function = function_body(BodyFeatures(int8_cache=True))
    for past in ("past_key", "past_value", *(x.name for x in contract.SCALE_INPUTS)):
        readers = [node.op_type for node in function.node if past in node.input]
        assert readers == ["TensorScatter"]


@pytest.mark.skipif(not INSTALLED.is_file(), reason="no C++ compiler, no kernels were built")
def test_scales_of_a_wrong_shape_end_the_step_in_words():
    case = CASES["plain"]
    history = History(case, [5], 2, torch.float32)
    past, new = torch.tensor([5]), torch.tensor([2])
    caches, scales = rounded_caches(history, case.capacity)
    shared = shared_inputs(case, past, new, 2, case.capacity)
    scales[1] = scales[1][:, :, 1:].clone()
    form = OnnxNode(case, kernels=INSTALLED, int8_cache=True)
    message = rf"past_value_scale has shape \(1, 2, {case.capacity - 1}, 1\), expected"
    with pytest.raises(Exception, match=message):
        form(case, [*history.chunk(past, new, 2), *caches, *shared, *scales])
