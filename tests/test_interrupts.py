"""An interrupt at any line leaves a state that goes on; a second thread is refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from lminf_export.errors import InputError
from tests.support.interrupter import Interrupter
from tests.support.kinds_of_session import KINDS, opened
from tests.support.tiny_bundle import TinyModel

# Rings of 84 slots, bound in steps of 64: they grow twice.
TINY = TinyModel(window_size=75, chunk_size=7, sliding_window=5, head_dim=32, vocab_size=61)
LENGTHS = [60, 41, 3]


@pytest.fixture(params=KINDS)
def lm(request, tmp_path, monkeypatch):
    return opened(request.param, tmp_path, monkeypatch, TINY)


def lines_of(work):
    with Interrupter() as counted:
        work()
    return counted.lines


def places(lm, count):
    """Every line in onnxruntime, and about twelve of them on doubles, which are slow."""
    step = 1 if lm.session.caches_in_main_memory else max(1, count // 12)
    return range(1, count + 1, step)


def tokens(seed, width=30):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (3, width))


def begun(lm, full=False):
    state = lm.new_state(3, full=full)
    lm.forward(tokens(0, 60), state, lengths=LENGTHS, logits="none")
    return state


def logits_after(lm, state):
    ids = tokens(9, 20)
    return np.concatenate([lm.forward(ids[:, :1], state), lm.forward(ids, state)], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_a_state_goes_on_behind_an_interrupt_at_any_line_of_forward(lm, full):
    ids, counts = tokens(1), np.array([30, 9, 17])

    def read(state):
        lm.forward(ids, state, lengths=counts, logits="last")

    undisturbed = begun(lm, full)
    count = lines_of(lambda: read(undisturbed))
    end = undisturbed.past_length
    wanted = logits_after(lm, undisturbed)
    assert count > 150
    for at in places(lm, count):
        state = begun(lm, full)
        with Interrupter(at):
            read(state)
        done = state.past_length - LENGTHS
        assert (done >= 0).all()
        left = counts - done
        if left.any():
            rest = np.stack([np.roll(row, -n) for row, n in zip(ids, done, strict=True)])
            lm.forward(rest[:, : left.max()], state, lengths=left, logits="none")
        assert (state.past_length == end).all(), f"line {at}"
        np.testing.assert_allclose(logits_after(lm, state), wanted, atol=2e-4, err_msg=f"line {at}")


WORK = {
    "restore": lambda state, saved: state.restore(saved),
    "reset": lambda state, saved: state.reset(),
    "copy_row": lambda state, saved: state.copy_row(0, 1),
    "stand_at": lambda state, saved: state.stand_at(70),
    "snapshot": lambda state, saved: state.snapshot(),
}


@pytest.mark.parametrize("name", WORK)
def test_an_interrupt_at_any_line_leaves_a_state_before_or_after(lm, name):
    """In a GPU's memory streams may also be empty: their caches are copied one by one."""
    other = lm.new_state(3)
    lm.forward(tokens(2, 90), other, logits="none")
    saved, before = other.snapshot(), begun(lm).snapshot()
    after = begun(lm)
    count = lines_of(lambda: WORK[name](after, saved))
    wanted = {}
    for at in places(lm, count):
        state = begun(lm)
        with Interrupter(at):
            WORK[name](state, saved)
        found = tuple(state.past_length.tolist())
        if found not in wanted:
            wanted[found] = state, logits_after(lm, state)
        else:
            np.testing.assert_allclose(
                logits_after(lm, state), wanted[found][1], atol=2e-4, err_msg=f"line {at}"
            )
    ends = {tuple(before.past_length.tolist()), tuple(after.past_length.tolist())}
    for lengths, logits in wanted.items():
        alone = lm.new_state(3)
        if lengths not in ends:
            assert not lm.session.caches_in_main_memory
            assert set(lengths) <= {0, *before.past_length.tolist()}
        elif lengths == tuple(before.past_length.tolist()):
            alone.restore(before)
            np.testing.assert_allclose(logits_after(lm, alone), logits[1], atol=2e-4)


@pytest.mark.slow
def test_generation_goes_on_behind_an_interrupt_at_any_line(lm):
    """Rings grow on the way; the ids that the state has not read are those to go on with."""
    prompt = tokens(3, 60)[0].tolist()

    def continued(ids, state, count):
        return lm.generate(ids, max_new_tokens=count, state=state, stop_token_ids=())

    wanted = list(continued(prompt, lm.new_state(), 12))
    lines = lines_of(lambda: list(continued(prompt, lm.new_state(), 12)))
    for at in places(lm, lines):
        state, found = lm.new_state(), []
        with Interrupter(at):
            for token in continued(prompt, state, 12):
                found.append(token)  # what came before the interrupt counts
        unread = [*prompt, *found][state.furthest :]
        if unread:
            found += continued(unread, state, 12 - len(found))
            assert found == wanted, f"line {at}"
        else:
            # The latest token had been read when the interrupt came; its logits are lost.
            assert found == wanted[: len(found)]


@pytest.mark.parametrize("use", ["forward", "snapshot", "restore", "reset", "copy_row", "step"])
def test_a_state_at_work_in_another_thread_is_refused(lm, use, monkeypatch):
    state = lm.new_state(2, full=True)
    view, saved = state.rows(0, 1), state.snapshot()
    uses = {
        "forward": lambda: lm.forward([[1], [2]], state),
        "snapshot": lambda: state.snapshot(),
        "restore": lambda: state.restore(saved),
        "reset": lambda: view.reset(),
        "copy_row": lambda: state.copy_row(0, 1),
        "step": lambda: list(lm.generate([1], max_new_tokens=2, state=view)),
    }
    begun, finish, step = threading.Event(), threading.Event(), type(lm.session).step

    def slow(*arguments):
        begun.set()
        assert finish.wait(20)
        return step(*arguments)

    monkeypatch.setattr(type(lm.session), "step", slow)
    thread = threading.Thread(target=lm.forward, args=([[1, 2], [3, 4]], state))
    thread.start()
    try:
        assert begun.wait(20)
        with pytest.raises(
            InputError, match=r"^this state, or a view of it, is at work in another"
        ):
            uses[use]()
    finally:
        finish.set()
        thread.join()
    assert state.past_length.tolist() == [2, 2]
    uses[use]()


def test_threads_that_share_a_state_lose_no_step_and_no_order(lm):
    """Each step is either whole or refused; a refused one changes nothing."""
    state, done, refused = lm.new_state(), [0, 0], [0, 0]

    def work(index):
        for _ in range(300):
            try:
                lm.forward([[index]], state, logits="none")
                done[index] += 1
            except InputError:
                refused[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(done) == state.furthest
    assert sum(done) + sum(refused) == 600


def test_generators_of_one_thread_may_take_turns_with_other_uses(lm):
    state = lm.new_state()
    generator = lm.generate([1, 2], max_new_tokens=5, state=state, stop_token_ids=())
    found = [next(generator)]
    saved = state.snapshot()
    found += list(generator)
    state.restore(saved)
    again = lm.generate(found[:1], max_new_tokens=4, state=state, stop_token_ids=())
    assert found[1:] == list(again)
