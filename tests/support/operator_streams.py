"""Streams of ragged chunks through any form of the operator, and the cases they are fed with."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from benchmarks.support.operator_case import Case, History, shared_inputs

BASES = (0, 10**6, 2 * 10**8, 10**12)


def stream(form, case: Case, history: History, chunks, small_ring: bool = False):
    """Feed a stream in ragged chunks through one form of the operator; yield checked errors."""
    wanted = history.oracle()
    past = torch.tensor(history.bases)
    capacity = case.capacity
    if small_ring:
        assert max(history.bases) == 0
        capacity = min(capacity, max(max(c) for c in chunks))
    caches = history.caches(capacity)
    error = 0.0
    for new_lengths in chunks:
        new = torch.tensor(new_lengths)
        width = max(new_lengths)
        if small_ring and int(past.max()) + width > caches[0].shape[2]:
            caches[:2] = [grow(c, case.capacity) for c in caches[:2]]
        capacity = caches[0].shape[2]
        inputs = [
            *history.chunk(past, new, width),
            *caches,
            *shared_inputs(case, past, new, width, capacity),
        ]
        before = caches
        output, *caches = form(case, inputs)
        if not case.num_sink_tokens:
            caches[2:] = before[2:]
        for row, base in enumerate(history.bases):
            count, start = int(new[row]), int(past[row]) - base
            got = output[row, :, :count].double()
            assert torch.isfinite(output).all()
            if count:
                error = max(error, float((got - wanted[row, :, start : start + count]).abs().max()))
        past = past + new
    return error


def grow(ring, capacity):
    grown = torch.zeros(*ring.shape[:2], capacity, ring.shape[3], dtype=ring.dtype)
    grown[:, :, : ring.shape[2]] = ring
    return grown


def random_chunks(case: Case, rows: int, steps: int, seed: int):
    rng = np.random.default_rng(seed)
    chunks = []
    for _ in range(steps):
        new = rng.integers(0, case.chunk_size + 1, size=rows)
        new[rng.integers(rows)] = max(1, new.max())
        chunks.append([int(n) for n in new])
    return chunks


def total(chunks):
    return max(sum(c[row] for c in chunks) for row in range(len(chunks[0])))


CASES = {
    "plain": Case(),
    "interleaved": Case(interleaved=True),
    "full_rotation": Case(rotary_dim=12),
    "yarn": Case(attention_factor=1.3),
    "alibi": Case(rotary_dim=0, alibi=True),
    "no_position": Case(rotary_dim=0),
    "softcap": Case(softcap=2.0),
    "learned_sink_logits": Case(sink_logits=True),
    "no_sinks": Case(num_sink_tokens=0),
    "more_sinks_than_window": Case(num_sink_tokens=17, window_size=5),
    "window_of_one": Case(window_size=1, num_sink_tokens=2),
    "chunk_above_window": Case(window_size=5, chunk_size=11),
    "single_tokens_ring_equals_window": Case(window_size=7, chunk_size=1),
    "far_limit": Case(distance_limit=29),
    "one_head": Case(num_heads=1, num_kv_heads=1),
    "all_heads": Case(num_heads=5, num_kv_heads=5),
}
# float32 rounding of logits and sums of a few dozen terms of size one; the reference is float64.
TOLERANCE = 2e-5

cases = st.builds(
    Case,
    window_size=st.integers(1, 19),
    num_sink_tokens=st.integers(0, 23),
    chunk_size=st.integers(1, 23),
    interleaved=st.booleans(),
    rotary_dim=st.sampled_from([0, 2, 8, 12]),
    attention_factor=st.sampled_from([1.0, 1.3]),
    softcap=st.sampled_from([0.0, 3.0]),
    alibi=st.booleans(),
    sink_logits=st.booleans(),
    seed=st.integers(0, 2**16),
)
