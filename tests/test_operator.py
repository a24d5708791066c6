"""The operator's forms against the mathematics: torch reference, torch op, ONNX function body."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.support.operator_case import Case, History, shared_inputs
from benchmarks.support.operator_node import OnnxNode
from lminf_export.operator import reference, torch_operator
from tests.support.operator_streams import (
    BASES,
    CASES,
    TOLERANCE,
    cases,
    random_chunks,
    stream,
    total,
)


def run_reference(case, inputs):
    return reference.lambda_attention(*inputs, **case.attributes())


def run_torch_op(case, inputs):
    return torch_operator.lambda_attention(*inputs, **case.attributes())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("base", BASES)
def test_reference_ring_equals_distances(name, base):
    case = CASES[name]
    chunks = random_chunks(case, rows=3, steps=24, seed=base % 97)
    history = History(
        case, [base, base + 5, base + 131 if base else 0], total(chunks), torch.float64
    )
    # Caches are rotated by float32 digit tables: their rounding is what remains.
    assert stream(run_reference, case, history, chunks) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("in_place", [False, True])
def test_onnx_body_equals_distances(name, base, in_place):
    case = CASES[name]
    chunks = random_chunks(case, rows=3, steps=24, seed=base % 89 + in_place)
    history = History(
        case, [base, base + 5, base + 131 if base else 0], total(chunks), torch.float32
    )
    assert stream(OnnxNode(case, in_place=in_place), case, history, chunks) < TOLERANCE


@pytest.mark.parametrize("in_place", [False, True])
def test_small_ring_grown_by_a_front_copy(in_place):
    case = Case(window_size=29, chunk_size=7)
    chunks = random_chunks(case, rows=2, steps=30, seed=5)
    history = History(case, [0, 0], total(chunks), torch.float32)
    assert (
        stream(OnnxNode(case, in_place=in_place), case, history, chunks, small_ring=True)
        < TOLERANCE
    )


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases, base=st.sampled_from(BASES), in_place=st.booleans(), seed=st.integers(0, 999))
def test_every_form_equals_distances(case, base, in_place, seed):
    chunks = random_chunks(case, rows=2, steps=12, seed=seed)
    history = History(case, [base, base + seed], total(chunks), torch.float32)
    for form in (run_reference, run_torch_op, OnnxNode(case, in_place=in_place)):
        assert stream(form, case, history, chunks) < TOLERANCE


@pytest.mark.parametrize("name", ["plain", "alibi", "no_sinks"])
def test_torch_op_passes_opcheck(name):
    case = CASES[name]
    history = History(case, [3, 0], 5, torch.float32)
    past, new = torch.tensor(history.bases), torch.tensor([5, 4])
    inputs = [
        *history.chunk(past, new, 5),
        *history.caches(case.capacity),
        *shared_inputs(case, past, new, 5, case.capacity),
    ]
    torch.library.opcheck(
        torch.ops.lminf.lambda_attention.default, tuple(inputs), case.attributes()
    )
