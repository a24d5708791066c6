"""The engine: what a request gets is what it gets alone, whoever comes, goes, waits or fails."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from lminf_export.errors import BusyError, InputError, SessionError
from lminf_export.runtime.batching import sequence as sequence_module
from lminf_export.runtime.batching.engine import Engine
from lminf_export.runtime.batching.request import Request
from lminf_export.runtime.batching.slot_pool import SlotPool
from lminf_export.runtime.batching.stream import Mailbox
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load
from lminf_export.runtime.sampling import SamplingConfig
from tests.support.kinds_of_session import KINDS, opened
from tests.support.tiny_bundle import TinyModel

# onnxruntime's own products compute a row in the same order in any batch where sizes are multiples
# of 8; of others the last bits depend on the batch, and so, now and then, a drawn token.
TINY = TinyModel(sliding_window=5, head_dim=8, logits_scale=0.25)
# An engine takes views of rows of 256 bytes and multiples; of others it steps several rows.
ALIGNED = replace(TINY, head_dim=32, logits_scale=2**-7)


@pytest.fixture(params=[*KINDS, "engine with the plugin, aligned"])
def any_lm(request, tmp_path, monkeypatch):
    kind, _, aligned = request.param.partition(", ")
    tiny = ALIGNED if aligned else TINY
    return opened(kind, tmp_path, monkeypatch, tiny, max_batch_size=3)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load(
        TINY.write(tmp_path_factory.mktemp("lm") / "bundle").path, threads=1, kernels="none"
    )


def prompt(number: int, length: int) -> list[int]:
    return np.random.default_rng(number).integers(0, 250, length).tolist()


def requests(count: int, seed: int = 0) -> list[Request]:
    """Requests of many kinds: short and long prompts, greedy and drawn, penalised, ended."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        sampling = SamplingConfig(
            temperature=float(rng.choice([0.0, 0.7, 1.3])),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1.0, 0.9])),
            repetition_penalty=float(rng.choice([1.0, 1.2])),
            seed=number,
        )
        found.append(
            Request(
                prompt(number, int(rng.choice([1, 2, 7, 23, 40]))),
                max_new_tokens=int(rng.integers(1, 45)),
                sampling=sampling,
                stop_token_ids=frozenset(rng.integers(0, 250, 3).tolist()),
            )
        )
    return found


def alone(lm: LanguageModel, request: Request) -> list[int]:
    s = request.sampling
    return list(
        lm.generate(
            request.prompt_ids,
            max_new_tokens=request.max_new_tokens,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            repetition_penalty=s.repetition_penalty,
            seed=s.seed,
            stop_token_ids=request.stop_token_ids,
        )
    )


def ids(stream) -> list[int]:
    return [token.id for token in stream]


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "it did not happen"
        time.sleep(0.001)


@pytest.mark.parametrize("quantum", [2, 1000])
def test_every_request_gets_what_it_gets_alone(any_lm, quantum):
    wanted = requests(24)
    with Engine(any_lm, slots=3, quantum=quantum) as engine:
        streams = [engine.submit(request) for request in wanted]
        found = [ids(stream) for stream in streams]
        stats = engine.stats()
    assert found == [alone(any_lm, request) for request in wanted]
    assert {stream.finish_reason for stream in streams} <= {"length", "stop_token"}
    assert (stats.active, stats.waiting, stats.parked) == (0, 0, 0)
    assert stats.prompt_tokens == sum(len(request.prompt_ids) for request in wanted)


def test_requests_that_come_and_go_at_any_time_from_many_threads_change_nothing(lm):
    wanted = requests(60, seed=3)
    found: dict[int, list[int]] = {}

    def ask(first: int) -> None:
        rng = np.random.default_rng(first)
        for number in range(first, len(wanted), 6):
            time.sleep(float(rng.random()) * 0.01)
            stream = engine.submit(wanted[number])
            if number % 5 == 4:
                next(stream, None)
                stream.cancel()
            else:
                found[number] = ids(stream)

    with Engine(lm, slots=4, quantum=5) as engine:
        threads = [threading.Thread(target=ask, args=(first,)) for first in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.drain(20)
        assert engine.stats().active == 0
    assert found == {n: alone(lm, wanted[n]) for n in range(60) if n % 5 != 4}


def test_log_probabilities_are_those_of_the_models_own_logits(lm):
    request = Request(prompt(1, 9), max_new_tokens=6, num_logprobs=3)
    with Engine(lm, slots=2) as engine:
        tokens = list(engine.submit(request))
    state, read = lm.new_state(), [*request.prompt_ids]
    for token in tokens:
        logits = lm.forward([read], state, logits="last")[0, 0].astype(np.float64)
        logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert token.logprob == pytest.approx(logprobs[token.id], abs=1e-6)
        assert [i for i, _ in token.top] == np.argsort(-logprobs)[:3].tolist()
        read = [token.id]


def test_continuations_of_one_prompt_read_it_once_and_draw_with_the_next_seeds(lm):
    sampling = SamplingConfig(temperature=1.2, seed=5)
    request = Request(prompt(4, 31), max_new_tokens=12, sampling=sampling)
    with Engine(lm, slots=2, quantum=3) as engine:
        streams = engine.submit_many(request, 4)
        found = [ids(stream) for stream in streams]
        assert engine.stats().prompt_tokens == 31
    for index, tokens in enumerate(found):
        seeded = SamplingConfig(temperature=1.2, seed=5 + index)
        one = Request(request.prompt_ids, max_new_tokens=12, sampling=seeded)
        assert tokens == alone(lm, one)


def test_when_the_one_that_reads_a_shared_prompt_is_cancelled_the_others_still_get_theirs(lm):
    request = Request(prompt(4, 20000), max_new_tokens=5)  # not read before the cancel
    with Engine(lm, slots=1) as engine:
        first, *others = engine.submit_many(request, 3)
        first.cancel()
        assert [ids(stream) for stream in others] == [alone(lm, request)] * 2
    assert first.finish_reason == "cancelled"


@pytest.mark.parametrize("changes", [{"kv_cache_dtype": "int8"}, {"num_sink_tokens": 0}], ids=str)
def test_other_kinds_of_caches_are_moved_and_parked_whole(tmp_path, changes):
    tiny = replace(TINY, **changes)
    lm = load(tiny.write(tmp_path / "bundle").path, threads=1, kernels="none")
    wanted = requests(12, seed=5)
    with Engine(lm, slots=3, quantum=3) as engine:
        streams = [engine.submit(request) for request in wanted]
        assert [ids(stream) for stream in streams] == [alone(lm, request) for request in wanted]


@pytest.mark.parametrize("quantum", [2, 1000])
def test_a_kept_state_goes_on_as_if_nothing_had_come_between(any_lm, quantum):
    whole = list(any_lm.generate(prompt(8, 10), max_new_tokens=60, stop_token_ids=()))
    with Engine(any_lm, slots=2, quantum=quantum) as engine:
        for number in range(3):
            engine.submit(requests(3, seed=number)[number])
        options = {"max_new_tokens": 30, "stop_token_ids": frozenset(), "keep": True}
        first = engine.submit(Request(prompt(8, 10), **options))
        assert ids(first) == whole[:30]
        kept = first.kept
        assert kept.unread == (whole[29],)
        for _ in range(2):  # it is a value: nothing that goes on from it changes it
            second = engine.submit(Request(kept.unread, **options, start=kept.snapshot))
            assert ids(second) == whole[30:]


def test_what_a_cancelled_request_has_not_read_is_named(lm):
    long = prompt(2, 30000)
    with Engine(lm, slots=1) as engine:
        stream = engine.submit(Request(long, max_new_tokens=5, keep=True))
        wait_until(lambda: engine.stats().prompt_tokens > 0)
        stream.cancel()
        assert ids(stream) == []
        kept = stream.kept
        read = int(kept.snapshot.past_length[0])
        assert 0 < read < 30000
        assert [*kept.unread] == long[read:]
        again = engine.submit(Request(kept.unread, max_new_tokens=5, start=kept.snapshot))
        assert ids(again) == alone(lm, Request(long, max_new_tokens=5))


def test_a_request_for_no_tokens_reads_its_prompt(lm):
    with Engine(lm, slots=1) as engine:
        read = engine.submit(Request(prompt(2, 30), max_new_tokens=0, keep=True))
        assert ids(read) == []
        assert read.finish_reason == "length"
        assert read.kept.unread == ()
        assert read.kept.snapshot.past_length.tolist() == [30]


def endless(number: int = 0) -> Request:
    return Request(prompt(number, 3), max_new_tokens=None, stop_token_ids=frozenset())


def test_a_cancelled_stream_frees_its_slot_and_an_abandoned_one_too(lm):
    with Engine(lm, slots=1, quantum=10**9) as engine:
        stream = engine.submit(endless())
        next(stream)
        stream.cancel()
        assert ids(engine.submit(Request(prompt(1, 5), 4))) == alone(lm, Request(prompt(1, 5), 4))
        assert stream.finish_reason == "cancelled"
        left = engine.submit(endless())
        next(left)
        del left
        gc.collect()
        wait_until(lambda: engine.stats().active == 0)


def test_a_deadline_ends_a_request_that_writes_or_waits(lm):
    with Engine(lm, slots=1, quantum=10**9) as engine:
        runs = engine.submit(Request(**{**vars(endless()), "deadline": 0.2}))
        waits = engine.submit(Request(prompt(1, 3), 5, deadline=0.05))
        assert ids(waits) == []
        assert waits.finish_reason == "deadline"
        assert len(ids(runs)) > 0
        assert runs.finish_reason == "deadline"


def written(stream, before: int) -> int:
    return stream.num_tokens - before


def test_endless_streams_share_the_slots_and_nobody_starves(lm):
    with Engine(lm, slots=2, quantum=8) as engine:
        streams = [engine.submit(endless(number)) for number in range(5)]
        short = engine.submit(Request(prompt(9, 4), 6))
        assert ids(short) == alone(lm, Request(prompt(9, 4), 6))
        # Before the last one came, those before it had the slots for themselves.
        before = [stream.num_tokens for stream in streams]
        wait_until(lambda: min(map(written, streams, before)) > 40)
        counts = [written(stream, count) for stream, count in zip(streams, before, strict=True)]
        assert max(counts) <= min(counts) + 5 * 8
        for number, stream in enumerate(streams):
            stream.cancel()
            tokens = ids(stream)
            assert tokens == alone(
                lm, Request(prompt(number, 3), len(tokens), stop_token_ids=frozenset())
            )


def test_a_full_queue_refuses_and_takes_again_later(lm):
    with Engine(lm, slots=1, max_waiting=2, quantum=10**9) as engine:
        streams = [engine.submit(endless(n)) for n in range(3)]
        with pytest.raises(BusyError, match="at most 3 may; try again later"):
            engine.submit(endless())
        streams[2].cancel()
        wait_until(lambda: streams[2].finished_at is not None)
        engine.submit(endless()).cancel()


def test_a_reader_that_takes_nothing_pauses_its_own_stream_only(lm, monkeypatch):
    monkeypatch.setattr(sequence_module, "MAILBOX_TOKENS", 20)
    with Engine(lm, slots=1) as engine:
        slow = engine.submit(Request(prompt(3, 3), 100, stop_token_ids=frozenset()))
        wait_until(lambda: engine.stats().active == 0 and slow.num_tokens == 20)
        assert ids(engine.submit(Request(prompt(1, 5), 4))) == alone(lm, Request(prompt(1, 5), 4))
        assert slow.num_tokens == 20
        wanted = alone(lm, Request(prompt(3, 3), 100, stop_token_ids=frozenset()))
        assert ids(slow) == wanted


def test_tokens_reach_their_reader_before_the_state_behind_them_is_copied(lm, monkeypatch):
    taken = threading.Event()
    copy = SlotPool.snapshot

    def late(pool, row):
        assert taken.wait(20), "the copy came first"
        return copy(pool, row)

    monkeypatch.setattr(SlotPool, "snapshot", late)
    with Engine(lm, slots=1) as engine:
        stream = engine.submit(Request(prompt(1, 5), 1, keep=True))
        next(stream)
        taken.set()
        assert list(stream) == []
        assert stream.kept is not None


def test_a_reader_that_takes_nothing_for_too_long_loses_its_stream(lm, monkeypatch):
    monkeypatch.setattr(sequence_module, "MAILBOX_TOKENS", 20)
    with Engine(lm, slots=1, reader_timeout=0.1) as engine:
        slow = engine.submit(endless())
        wait_until(lambda: slow.finished_at is not None)
        assert slow.finish_reason == "slow_reader"
        assert len(slow.take()) == 20
        assert engine.stats().parked_bytes == 0


def test_logits_that_are_no_numbers_end_one_request_and_leave_no_trace(tmp_path):
    tiny = replace(TINY, nan_token=256)
    lm = load(tiny.write(tmp_path / "bundle").path, threads=1, kernels="none")
    with Engine(lm, slots=2) as engine:
        good = engine.submit(Request(prompt(7, 9), 60))
        bad = engine.submit(Request([3, 256], 5))
        with pytest.raises(InputError, match="no token can be chosen"):
            ids(bad)
        assert ids(good) == alone(lm, Request(prompt(7, 9), 60))
        after = [engine.submit(Request(prompt(6 + n, 9), 9)) for n in range(2)]
        for number, stream in enumerate(after):
            assert ids(stream) == alone(lm, Request(prompt(6 + number, 9), 9))


def test_a_step_that_fails_ends_those_in_it_and_the_engine_goes_on(lm, monkeypatch):
    with Engine(lm, slots=2) as engine:
        decode, calls = engine._loop.turns.pool.decode, []

        def fails_once(count):
            calls.append(count)
            if len(calls) == 3:
                raise SessionError("no memory")
            return decode(count)

        monkeypatch.setattr(engine._loop.turns.pool, "decode", fails_once)
        stream = engine.submit(Request(prompt(5, 9), 60, stop_token_ids=frozenset()))
        with pytest.raises(SessionError, match="no memory"):
            ids(stream)
        assert ids(engine.submit(Request(prompt(1, 5), 4))) == alone(lm, Request(prompt(1, 5), 4))
        assert engine.stats().healthy


def test_an_engine_whose_beginning_is_interrupted_leaves_no_thread(lm, monkeypatch):
    before, start = set(threading.enumerate()), threading.Thread.start

    def interrupted(thread):
        start(thread)
        if thread.name == "lminf-engine":
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Engine(lm, slots=1)
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_a_thread_that_fails_ends_all_streams_with_an_error(lm, monkeypatch, caplog):
    with Engine(lm, slots=1) as engine:
        begins = threading.Event()

        def fails(count):
            begins.wait()
            return 1 / 0

        monkeypatch.setattr(engine._loop.turns.pool, "decode", fails)
        streams = [engine.submit(Request(prompt(n, 9), 60)) for n in range(2)]
        begins.set()
        for stream in streams:
            with pytest.raises(SessionError, match="this engine has failed"):
                ids(stream)
        assert not engine.stats().healthy
        with pytest.raises(SessionError, match="has failed; it takes no requests"):
            engine.submit(endless())
    assert "ZeroDivisionError" in caplog.text


def test_closing_ends_what_runs_and_draining_waits_for_it(lm):
    engine = Engine(lm, slots=1)
    stream = engine.submit(endless())
    assert not engine.drain(0.05)
    with pytest.raises(SessionError, match="is closed"):
        engine.submit(endless())
    engine.close()
    ids(stream)
    assert stream.finish_reason == "closed"
    engine.close()


def test_streams_are_read_in_an_event_loop(lm):
    wanted = requests(8, seed=11)

    async def read(engine, request):
        return [token.id async for token in engine.submit(request)]

    async def main():
        with Engine(lm, slots=3) as engine:
            return await asyncio.gather(*(read(engine, request) for request in wanted))

    assert asyncio.run(main()) == [alone(lm, request) for request in wanted]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "the prompt is empty"),
        ({"prompt_ids": [257]}, "outside the vocabulary"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1: must be at least 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"sampling": None}, "must be a SamplingConfig"),
        ({"stop_token_ids": 2}, "stop_token_ids"),
        ({"num_logprobs": 21}, "must be at most 20"),
        ({"deadline": float("nan")}, "deadline"),
        ({"deadline": "soon"}, "deadline"),
        ({"ends_at": 3}, "ends_at"),
        ({"start": 3}, "expected a Snapshot"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_in_one_line(lm, change, message):
    fields = {"prompt_ids": [1, 2], "max_new_tokens": 4}
    with Engine(lm, slots=1) as engine, pytest.raises(InputError, match=message):
        engine.submit(Request(**{**fields, **change}))


def test_a_start_of_another_bundle_is_refused(lm, tmp_path):
    other = load(TinyModel(num_layers=3).write(tmp_path / "o").path, threads=1, kernels="none")
    state = other.new_state()
    other.forward([[1, 2, 3]], state, logits="none")
    snapshot = state.snapshot()
    with Engine(lm, slots=1) as engine, pytest.raises(SessionError, match="of another bundle"):
        engine.submit(Request([1], 4, start=snapshot))


def test_a_checkpoint_is_the_state_behind_so_much_of_a_prompt(any_lm):
    request = Request(prompt(4, 30), 12, sampling=SamplingConfig(temperature=0.9, seed=3))
    chunk = any_lm.bundle.manifest.lambda_config.chunk_size
    with Engine(any_lm, slots=3, quantum=2) as engine:
        for count in (1, chunk, 2 * chunk, 17, 30):
            streams = engine.submit_many(replace(request, checkpoint=count), 3)
            found = [ids(stream) for stream in streams]
            (snapshot,) = [s.checkpoint for s in streams if s.checkpoint is not None]
            assert snapshot.past_length.tolist() == [count]
            if count % chunk == 0:
                assert found[0] == alone(any_lm, request)
            if count < 30:
                rest = replace(request, prompt_ids=request.prompt_ids[count:], start=snapshot)
                assert ids(engine.submit(rest)) == found[0]
    state = any_lm.prime(request.prompt_ids)
    assert all(
        np.allclose(snapshot.caches[name], array, atol=1e-5)
        for name, array in state.snapshot().caches.items()
    )


def test_continuations_that_only_read_write_nothing(lm):
    with Engine(lm, slots=2) as engine:
        streams = engine.submit_many(Request(prompt(1, 9), 0, keep=True), 3)
        assert [ids(stream) for stream in streams] == [[], [], []]
        assert {stream.finish_reason for stream in streams} == {"length"}
        assert {stream.kept.unread for stream in streams} == {()}


def test_a_cancel_is_heard_while_somebody_waits_for_the_end(lm, monkeypatch):
    monkeypatch.setattr(sequence_module, "MAILBOX_TOKENS", 20)
    engine = Engine(lm, slots=1)
    stream = engine.submit(endless())
    waiting = threading.Thread(target=engine.drain)
    waiting.start()
    wait_until(lambda: stream.num_tokens == 20 and engine.stats().active == 0)
    time.sleep(0.2)
    stream.cancel()
    waiting.join(5)
    assert not waiting.is_alive()
    engine.close()


def test_an_interrupt_while_tokens_are_taken_loses_none(lm, monkeypatch):
    with Engine(lm, slots=1) as engine:
        stream = engine.submit(Request(prompt(1, 5), 50, stop_token_ids=frozenset()))
        wait_until(lambda: stream.finished_at is not None)
        move = Mailbox.move_to

        def interrupted(mailbox, target):
            move(mailbox, target)
            raise KeyboardInterrupt

        monkeypatch.setattr(Mailbox, "move_to", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        monkeypatch.undo()
        assert len(list(stream)) == 50


class NoTruth:
    def __bool__(self):
        raise ValueError("neither")


@pytest.mark.parametrize(
    "result", [SystemExit(3), asyncio.CancelledError(), GeneratorExit(), ValueError(), NoTruth()]
)
def test_a_function_that_would_end_the_program_ends_its_request(lm, result):
    def ends(_):
        if isinstance(result, BaseException):
            raise result
        return result

    with Engine(lm, slots=2) as engine:
        bad = engine.submit(Request(prompt(1, 5), 9, ends_at=ends))
        good = engine.submit(Request(prompt(1, 5), 4))
        with pytest.raises(InputError, match="ends_at has failed"):
            ids(bad)
        assert ids(good) == alone(lm, Request(prompt(1, 5), 4))
        assert engine.stats().healthy


def test_a_reader_that_comes_back_while_its_stream_is_parked_is_not_forgotten(lm, monkeypatch):
    monkeypatch.setattr(sequence_module, "MAILBOX_TOKENS", 20)
    copying, taken, copy = threading.Event(), threading.Event(), SlotPool.snapshot

    def slow(pool, row):
        copying.set()
        assert taken.wait(20)
        return copy(pool, row)

    monkeypatch.setattr(SlotPool, "snapshot", slow)
    request = Request(prompt(3, 3), 100, stop_token_ids=frozenset())
    with Engine(lm, slots=1) as engine:
        stream = engine.submit(request)
        assert copying.wait(20)
        found = [token.id for token in stream.take()]
        taken.set()
        assert found + ids(stream) == alone(lm, request)


def test_a_program_that_ends_while_an_engine_writes_ends_well(tmp_path):
    bundle = TINY.write(tmp_path / "bundle").path
    code = (
        "import lminf_export as l, sys; lm = l.load(sys.argv[1], threads=1)\n"
        "s = l.Engine(lm, 2).submit(l.Request([1, 2], None, stop_token_ids=frozenset())); next(s)"
    )
    for _ in range(3):
        told = subprocess.run([sys.executable, "-c", code, str(bundle)], timeout=60, check=False)
        assert told.returncode == 0


@pytest.mark.parametrize("count", [0, -1, 6, 2.5, True, "1", 10**400])
def test_a_checkpoint_that_is_not_in_the_prompt_is_refused(lm, count):
    with Engine(lm, slots=1) as engine, pytest.raises(InputError, match="checkpoint"):
        engine.submit(Request(prompt(1, 5), 1, checkpoint=count))
