"""Streams over rings of int8, with and without a bias of keys: inputs, and checks of results."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.support.int8_rings import attended, rounded_caches
from benchmarks.support.operator_case import History, shared_inputs
from lminf_export.operator import reference
from lminf_export.operator.reference_int8 import (
    INT8_LIMIT,
    lambda_attention_int8_cache,
    quantize,
)
from lminf_export.operator.rope import BASE, NUM_DIGITS
from tests.support.operator_streams import random_chunks, total


class ExactHistory(History):
    """Rotated in float64, so that nothing lies between two computations but the order of sums."""

    def _rotated(self, key, position, tables):
        cos, sin = exact_rows(self.case, torch.tensor([position]))
        return reference.rotate(key, cos, sin, interleaved=self.case.interleaved)


def exact_rows(case, position):
    """cos and sin (…, R/2) float64 of positions below 2^40: two angles that are exact, each."""
    low = position % 2**20
    turns = [digit[..., None].double() * case.inv_freq.double() for digit in (low, position - low)]
    (c0, s0), (c1, s1) = ((turn.cos(), turn.sin()) for turn in turns)
    m = case.attention_factor
    return (c0 * c1 - s0 * s1) * m, (s0 * c1 + c0 * s1) * m


def exact_inputs(case, past, new, width, capacity):
    shared = shared_inputs(case, past, new, width, capacity)
    if case.rotary_dim:
        limit = torch.tensor(case.limit)
        shared[4:6] = exact_rows(case, shared[2])
        shared[6:8] = (row * case.attention_factor for row in exact_rows(case, limit))
    return shared


def behind_scales(case, dtype=None):
    """The inputs of a key bias, in order; none without one."""
    if not case.key_bias:
        return []
    bias = case.bias if dtype is None else case.bias.to(dtype)
    if not case.rotary_dim:
        return [bias, *(torch.zeros(1, 1),) * 2]
    if dtype is torch.float64:
        return [bias, *exact_tables(case)]
    tables = case.tables()
    return [bias, tables.cos, tables.sin]


def exact_tables(case):
    """The digit tables in float64."""
    digits = torch.arange(BASE) * BASE ** torch.arange(NUM_DIGITS)[:, None]
    angles = digits.flatten()[:, None].double() * case.inv_freq.double()
    factors = torch.ones(NUM_DIGITS * BASE, 1).double()
    factors[:BASE] = case.attention_factor
    return angles.cos() * factors, angles.sin() * factors


def follow(form, case, history, chunks):
    """Feed a stream in ragged chunks; hold rings and outputs of each step to the specification.

    What the form wrote must be what the specification writes, but for ties that float32 decides;
    its output must be the specification's over what the form wrote. Returns the largest error.
    """
    past = torch.tensor(history.bases)
    caches, scales = rounded_caches(history, case.capacity)
    error, ties = 0.0, 0
    for new_lengths in chunks:
        new, width = torch.tensor(new_lengths), max(new_lengths)
        shared = shared_inputs(case, past, new, width, case.capacity)
        inputs = [*history.chunk(past, new, width), *caches, *shared, *scales]
        inputs += behind_scales(case, history.key.dtype)
        wanted = lambda_attention_int8_cache(*inputs, **case.attributes())
        before = caches
        output, *present = form(case, inputs)
        caches, scales = present[:4], present[4:]
        if not case.num_sink_tokens:
            caches[2:] = before[2:]
        ties += check_rings(case, inputs, [output, *present], wanted)
        right = attended(case, inputs, caches, scales)
        for row, count in enumerate(new_lengths):
            got = output[row, :, :count].double()
            if count:
                error = max(error, float((got - right[row, :, :count]).abs().max()))
        assert output.isfinite().all()
        past = past + new
    return error, ties


def follow_far_and_near(node, case):
    """Follow ragged streams of three rows at positions near and far.

    Returns the largest error, and how many of the numbers written fell to a tie's other side.
    """
    worst, ties, written = 0.0, 0, 0
    for base in (0, 10**12):
        chunks = random_chunks(case, rows=3, steps=12, seed=base % 89)
        bases = [base, base + 5, base + 131 if base else 0]
        history = History(case, bases, total(chunks), torch.float32)
        error, count = follow(node(case, in_place=bool(base)), case, history, chunks)
        worst, ties = max(worst, error), ties + count
        written += 2 * case.num_kv_heads * case.head_dim * sum(map(sum, chunks))
    # A row stays up to a window's tokens; each is compared at every step.
    return worst, ties / written


def follow_large(node, case, steps, bases):
    """Follow two rows through full chunks, then single tokens; return the largest error."""
    chunks = [[case.chunk_size, case.chunk_size - 1]] * steps + [[1, 1]] * 3
    history = History(case, bases, total(chunks), torch.float32)
    return follow(node(case, in_place=True), case, history, chunks)[0]


def check_rings(case, inputs, found, wanted):
    """Compare what later queries may see; return how many roundings fell to the other side."""
    past, new, slot = inputs[7], inputs[8], inputs[10]
    after = (past + new)[:, None]
    alive = ((slot >= 0) & (slot > after - case.window_size))[:, None, :, None]
    cos, sin = inputs[11:13]
    turn = partial(reference.turned, rotary_dim=case.rotary_dim, interleaved=case.interleaved)
    key = inputs[1].double()
    if case.key_bias:
        key = key - inputs[19].double()[None, :, None]
    rows = (turn(key, cos, sin), inputs[2].double())
    ties = 0
    for ring, scale, new_rows in zip((1, 2), (5, 6), rows, strict=True):
        torch.testing.assert_close(
            (found[scale] * alive).float(), wanted[scale] * alive, rtol=1e-6, atol=0
        )
        difference = (found[ring].int() - wanted[ring].int()) * alive
        assert difference.abs().max() <= 1
        steps = new_rows / quantize(new_rows)[1]
        ring_steps = reference.write_ring(found[ring].double(), steps, past)
        at = difference != 0
        from_tie = (ring_steps[at] - ring_steps[at].floor() - 0.5).abs()
        assert (from_tie < INT8_LIMIT * 1e-5).all()
        ties += int(at.sum())
    for sinks in (3, 4):
        if case.num_sink_tokens:
            assert torch.equal(found[sinks], wanted[sinks])
    return ties
