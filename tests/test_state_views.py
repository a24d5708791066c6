"""Views of a state's streams: steps over them are steps of streams alone, in any session."""

from __future__ import annotations

import numpy as np
import pytest

from lminf_export.errors import InputError, SessionError
from tests.support.kinds_of_session import KINDS, opened
from tests.support.tiny_bundle import TinyModel

# Rows of 256 · n bytes in every cache, which an engine's views need.
TINY = TinyModel(sliding_window=5, head_dim=32)
SLOTS = 4


@pytest.fixture(params=KINDS)
def lm(request, tmp_path, monkeypatch):
    return opened(request.param, tmp_path, monkeypatch, TINY, max_batch_size=SLOTS)


class Stream:
    """Tokens of one stream, and the stream alone."""

    def __init__(self, lm, seed):
        self._lm, self._state = lm, lm.new_state()
        self._rng = np.random.default_rng(seed)

    def tokens(self, count):
        return self._rng.integers(0, self._lm.vocab_size, count)

    def expect(self, tokens, found):
        wanted = self._lm.forward(tokens[None], self._state, logits="last")
        np.testing.assert_allclose(found, wanted[0], atol=2e-4)

    @property
    def length(self):
        return int(self._state.past_length[0])


@pytest.mark.parametrize("seed", [0, 1])
def test_streams_that_share_a_state_through_views_go_on_as_if_alone(lm, seed):
    """Rows 0 … n − 1 decode together while another row reads; rows move, end and begin."""
    rng = np.random.default_rng(seed)
    state = lm.new_state(SLOTS, full=True)
    together = {n: state.rows(0, n) for n in range(1, SLOTS + 1)}
    alone = [state.rows(row, row + 1) for row in range(SLOTS)]
    streams, made = [], 0
    for _ in range(150):
        if streams and rng.random() < 0.05:
            row = int(rng.integers(len(streams)))
            last = len(streams) - 1
            state.copy_row(last, row)
            alone[last].reset()
            streams[row] = streams[last]
            streams.pop()
        if len(streams) < SLOTS and rng.random() < 0.3:
            stream = Stream(lm, made)
            made += 1
            row = len(streams)
            alone[row].reset()
            for count in rng.integers(1, 40, 2):
                tokens = stream.tokens(count)
                stream.expect(tokens, lm.forward(tokens[None], alone[row], logits="last")[0])
                if streams:
                    decode(lm, together[len(streams)], streams)
            streams.append(stream)
        if streams:
            decode(lm, together[len(streams)], streams)
        assert state.past_length.tolist()[: len(streams)] == [x.length for x in streams]
    assert made > 4
    assert state.furthest > 100


def decode(lm, view, streams):
    tokens = np.array([stream.tokens(1) for stream in streams])
    found = lm.forward(tokens, view)
    for stream, ids, logits in zip(streams, tokens, found, strict=True):
        stream.expect(ids, logits)


def test_a_view_shares_lengths_and_caches_with_its_state(lm):
    state = lm.new_state(SLOTS, full=True)
    view = state.rows(1, 3)
    inner = view.rows(1, 2)
    lm.forward([[5, 6, 7]], inner, logits="none")
    assert state.past_length.tolist() == [0, 0, 3, 0]
    assert view.past_length.tolist() == [0, 3]
    assert view.furthest == inner.furthest == 3
    assert inner.nbytes * SLOTS == view.nbytes * 2 == state.nbytes == state.max_nbytes
    saved = inner.snapshot()
    np.testing.assert_array_equal(
        next(iter(saved.caches.values()))[0], next(iter(state.snapshot().caches.values()))[2]
    )
    other = lm.new_state()
    other.restore(saved)
    np.testing.assert_allclose(lm.forward([[9]], other), lm.forward([[9]], inner), atol=2e-4)
    other.restore(state.snapshot().rows([1]))
    assert other.furthest == 0
    assert state.furthest == 4


def test_a_row_that_is_restored_touches_no_other(lm):
    state = lm.new_state(SLOTS, full=True)
    ids = np.random.default_rng(1).integers(0, lm.vocab_size, (SLOTS, 50))
    lm.forward(ids, state, lengths=[50, 4, 1, 33], logits="none")
    before = state.snapshot()
    first, second = state.rows(0, 1), state.rows(1, 2)
    second.restore(first.snapshot())
    first.reset()
    after = state.snapshot()
    assert after.past_length.tolist() == [0, 50, 1, 33]
    for name, array in before.caches.items():
        np.testing.assert_array_equal(after.caches[name][[1, 2, 3]], array[[0, 2, 3]])
        assert not after.caches[name][0].any()


def test_only_full_rings_have_views_and_only_rows_that_are_there(lm):
    state = lm.new_state(2, full=True)
    for start, stop in [(0, 3), (1, 1), (2, 2), (-1, 1), (0.5, 1), (0, None)]:
        with pytest.raises(InputError):
            state.rows(start, stop)
    for source, target in [(0, 2), (-1, 0), (1.0, 0)]:
        with pytest.raises(InputError):
            state.copy_row(source, target)
    state.copy_row(1, 1)
    if lm.session.caches_in_main_memory:
        with pytest.raises(SessionError, match="full=True"):
            lm.new_state(2).rows(0, 1)


def test_an_engine_steps_over_no_view_at_an_address_that_tensorrt_does_not_take(
    tmp_path, monkeypatch
):
    lm = opened("engine", tmp_path, monkeypatch, TinyModel(sliding_window=5))
    state = lm.new_state(3, full=True)
    lm.forward([[1], [2], [3]], state, logits="none")
    assert state.rows(0, 2).can_step
    view = state.rows(1, 2)
    assert not view.can_step
    with pytest.raises(SessionError, match=r"^the streams of this view begin at an address .*$"):
        lm.forward([[1]], view)
    # What needs no step works.
    again = lm.new_state(1)
    again.restore(view.snapshot())
    assert again.past_length.tolist() == [1]
