"""How engines begin and end: dropped, forked, interrupted, short of memory, read by two."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

from lminf_export.errors import InputError, SessionError
from lminf_export.runtime import batching, snapshot_memory
from lminf_export.runtime.arrays import short_of_memory
from lminf_export.runtime.batching import sequence as sequence_module
from lminf_export.runtime.batching.engine import Engine
from lminf_export.runtime.batching.request import Request
from lminf_export.runtime.load import load
from tests.support.interrupter import Interrupter
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel(head_dim=8, logits_scale=0.25)  # see test_engine
BATCHING = str(Path(batching.__file__).parent)
NO_STOPS: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load(
        TINY.write(tmp_path_factory.mktemp("lm") / "bundle").path, threads=1, kernels="none"
    )


def request(length=5, count=4, **fields):
    return Request(list(range(length)), count, stop_token_ids=NO_STOPS, **fields)


def alone(lm, wanted):
    settings = {"max_new_tokens": wanted.max_new_tokens, "stop_token_ids": ()}
    return list(lm.generate(wanted.prompt_ids, **settings))


def ids(stream):
    return [token.id for token in stream]


def engine_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("lminf-")}


def wait_until(condition, seconds=20.0):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "it did not happen"
        time.sleep(0.001)


@pytest.mark.slow
def test_an_engine_that_nobody_holds_ends_its_threads_and_gives_its_memory_back(lm):
    before = engine_threads()
    engine = Engine(lm, slots=2)
    engine.submit(request(count=None)).cancel()
    pool = weakref.ref(engine._loop.turns.pool)
    del engine
    gc.collect()
    wait_until(lambda: engine_threads() <= before)
    gc.collect()
    assert pool() is None


@pytest.mark.slow
def test_a_stream_keeps_its_engine(lm):
    before = engine_threads()
    stream = Engine(lm, slots=1).submit(request(count=60))
    gc.collect()
    assert ids(stream) == alone(lm, request(count=60))
    assert stream.finish_reason == "length"
    del stream
    gc.collect()
    wait_until(lambda: engine_threads() <= before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_an_engine_says_in_a_forked_process_that_it_is_not_there(tmp_path):
    code = """
import os, sys, lminf_export as l
lm = l.load(sys.argv[1], threads=1)
engine = l.Engine(lm, 2)
request = l.Request([1, 2], None, stop_token_ids=frozenset())
stream = engine.submit(request)
next(stream)
child = os.fork()
if not child:
    told = []
    for work in (lambda: list(stream), lambda: engine.submit(request)):
        try:
            work()
        except l.SessionError as error:
            told.append("process that was forked" in str(error))
    engine.close()
    own = l.Engine(lm, 1)
    told.append(len(list(own.submit(l.Request([1, 2], 4, stop_token_ids=frozenset())))) == 4)
    own.close()
    os._exit(told != [True, True, True] or engine.stats().healthy or not engine.drain())
assert os.waitpid(child, 0)[1] == 0, "in the child"
next(stream)
"""
    bundle = TINY.write(tmp_path / "bundle").path
    told = subprocess.run(
        [sys.executable, "-c", code, str(bundle)],
        timeout=60,
        check=False,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr


def test_an_interrupt_at_any_line_of_a_submit_loses_no_place(lm):
    with Engine(lm, slots=1, max_waiting=2) as engine:
        line, interrupter = 0, None
        while interrupter is None or interrupter.has_come:
            line += 1
            held = []
            with Interrupter(line, BATCHING) as interrupter:
                held += engine.submit_many(request(count=None), 3)
            held.clear()
            wait_until(lambda: engine._loop.num_pending == 0)
        assert line > 20
        streams = engine.submit_many(request(), 3)
        assert [ids(stream) for stream in streams] == [alone(lm, request())] * 3


def test_an_interrupt_at_any_line_of_a_beginning_leaves_no_thread(lm):
    before = engine_threads()
    line, interrupter = 0, None
    while interrupter is None or interrupter.has_come:
        line += 1
        held = []
        with Interrupter(line, BATCHING) as interrupter:
            held.append(Engine(lm, slots=1))
    held.clear()
    wait_until(lambda: engine_threads() <= before)
    assert line > 20


@pytest.fixture
def no_memory(monkeypatch):
    """Lets copies of states find no memory, once it is called."""

    def begin():
        def fails(size):
            raise short_of_memory(size)

        monkeypatch.setattr(snapshot_memory, "unset_bytes", fails)

    return begin


def test_a_state_that_cannot_be_kept_ends_its_request_only(lm, no_memory):
    with Engine(lm, slots=2) as engine:
        good = engine.submit(request(count=500))
        no_memory()
        kept = engine.submit(request(count=9, keep=True))
        marked = engine.submit(request(count=9, checkpoint=3))
        for stream, count in ((kept, 9), (marked, 0)):
            with pytest.raises(SessionError, match="the memory is short"):
                ids(stream)
            assert stream.num_tokens == count
            assert stream.finish_reason is None
            assert stream.kept is None
        assert ids(good) == alone(lm, request(count=500))
        assert engine.stats().healthy


def test_a_sequence_that_cannot_be_parked_ends_and_the_others_go_on(lm, no_memory):
    with Engine(lm, slots=1, quantum=4) as engine:
        no_memory()
        first = engine.submit(request(count=None))
        second = engine.submit(request(count=4))
        assert ids(second) == alone(lm, request(count=4))
        with pytest.raises(SessionError, match="the memory is short"):
            ids(first)


def test_continuations_read_their_prompt_themselves_if_it_cannot_be_copied(lm, no_memory):
    with Engine(lm, slots=2) as engine:
        no_memory()
        streams = engine.submit_many(request(30, 9), 3)
        assert [ids(stream) for stream in streams] == [alone(lm, request(30, 9))] * 3
        assert engine.stats().prompt_tokens == 90


def test_rows_change_places_without_more_memory(lm, no_memory):
    with Engine(lm, slots=3) as engine:
        no_memory()
        long = engine.submit(request(60, 30))
        short = [engine.submit(request(3, 30)) for _ in range(2)]
        assert [ids(s) for s in (long, *short)] == [
            alone(lm, one) for one in (request(60, 30), request(3, 30), request(3, 30))
        ]


def test_a_second_thread_that_waits_for_the_same_tokens_is_refused(lm):
    with Engine(lm, slots=1) as engine:
        running = engine.submit(request(count=None))
        waiting = engine.submit(request())  # behind it
        found = []
        reader = threading.Thread(target=lambda: found.extend(waiting))
        reader.start()
        wait_until(lambda: waiting._mailbox._waiting)
        with pytest.raises(InputError, match="another thread or task waits for this stream"):
            next(waiting)
        with pytest.raises(InputError, match="another thread or task waits for this stream"):
            waiting.when_ready(print)
        running.cancel()
        reader.join(20)
        assert [token.id for token in found] == alone(lm, request())


def test_a_second_task_that_waits_for_the_same_tokens_is_refused(lm):
    async def main():
        with Engine(lm, slots=1) as engine:
            running = engine.submit(request(count=None))
            waiting = engine.submit(request())
            first = asyncio.create_task(anext(waiting))
            await asyncio.sleep(0)
            with pytest.raises(InputError, match="another thread or task waits"):
                await anext(waiting)
            # Who waits no more is in nobody's way.
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(waiting), 0.01)
            running.cancel()
            return [token.id async for token in waiting]

    assert asyncio.run(main()) == alone(lm, request())


def test_threads_that_read_by_turns_get_every_token_once(lm):
    with Engine(lm, slots=1) as engine:
        stream = engine.submit(request(count=3000))
        found, refused = [], []

        def read():
            while True:
                try:
                    found.append(next(stream).id)
                except StopIteration:
                    return
                except InputError:
                    refused.append(1)
                    time.sleep(0.0001)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
        assert not any(reader.is_alive() for reader in readers)
        assert sorted(found) == sorted(alone(lm, request(count=3000)))


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_a_function_to_be_called_that_is_none_or_fails_is_told_of(lm, caplog, error):
    def fails():
        raise error

    with Engine(lm, slots=2) as engine:
        stream = engine.submit(request())
        with pytest.raises(InputError, match="must be a function without arguments"):
            stream.when_ready(5)
        running = engine.submit(request(count=None))
        bad, good = engine.submit(request()), engine.submit(request())
        assert bad.when_ready(fails)
        running.cancel()
        assert ids(good) == alone(lm, request())
        wait_until(lambda: error.__name__ in caplog.text)
        assert ids(engine.submit(request())) == alone(lm, request())


def test_a_function_that_waits_for_the_engines_end_in_its_thread_is_refused(lm):
    with Engine(lm, slots=1) as engine:
        stream = engine.submit(request(ends_at=lambda _: engine.drain()))
        with pytest.raises(SessionError, match=r"drain\(\) waits for the engine"):
            ids(stream)


def test_a_stream_that_is_read_in_the_engines_threads_is_refused(lm):
    with Engine(lm, slots=2) as engine:
        other = engine.submit(request(count=None))
        waiting = engine.submit(request(ends_at=lambda _: bool(list(other))))
        while waiting.finished_at is None:
            other.take()
        with pytest.raises(SessionError, match="reading a stream waits for the engine"):
            ids(waiting)
        stream, found = engine.submit(request(count=None)), []

        def read():
            try:
                found.extend(stream)
            except SessionError as error:
                found.append(error)

        stream.take()
        while not stream.when_ready(read):
            stream.take()
        wait_until(lambda: found and isinstance(found[-1], SessionError))
        stream.cancel()
        assert ids(engine.submit(request())) == alone(lm, request())


def test_a_close_that_comes_while_the_thread_looks_at_calls_is_heard(lm, monkeypatch):
    engine = Engine(lm, slots=1)
    tend = engine._loop._tend

    def slow():
        time.sleep(0.1)
        tend()

    monkeypatch.setattr(engine._loop, "_tend", slow)
    engine.submit(request(count=None)).cancel()
    time.sleep(0.03)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()


def test_threads_that_take_at_the_same_time_get_every_token_once(lm):
    with Engine(lm, slots=1) as engine:
        stream, found = engine.submit(request(count=4000)), []

        def take():
            while stream.finished_at is None or stream._mailbox.items:
                found.extend(token.id for token in stream.take())

        takers = [threading.Thread(target=take) for _ in range(4)]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join(60)
        found.extend(token.id for token in stream.take())
        assert sorted(found) == sorted(alone(lm, request(count=4000)))


def test_a_kept_state_is_nobody_elses(lm):
    start = lm.prime([1, 2, 3]).snapshot()
    with Engine(lm, slots=1) as engine:
        running = engine.submit(request(count=None))
        waiting = engine.submit(request(start=start, keep=True))
        waiting.cancel()
        ids(waiting)
        running.cancel()
        state = lm.new_state()
        state.snapshot(into=waiting.kept.snapshot)
        assert len(ids(engine.submit(request(start=start)))) == 4


def test_a_closed_engine_has_nobody_active(lm):
    engine = Engine(lm, slots=2)
    streams = [engine.submit(request(count=None)) for _ in range(3)]
    for stream in streams[:2]:
        next(stream)
    engine.close()
    found = engine.stats()
    assert (found.active, found.prefilling, found.waiting, found.parked) == (0, 0, 0, 0)


def test_pieces_that_are_taken_slowly_end_nobody(lm, monkeypatch):
    monkeypatch.setattr(sequence_module, "MAILBOX_TOKENS", 20)
    made, make = [], Engine.__init__

    def told(engine, *arguments, **settings):
        make(engine, *arguments, **settings)
        made.append(settings["reader_timeout"])

    monkeypatch.setattr(Engine, "__init__", told)
    pieces = lm.generate_batch(
        [[1, 2], [3]], max_new_tokens=100, stream=True, stop_token_ids=(), slots=2
    )
    found = {0: [], 1: []}
    for number, piece in enumerate(pieces):
        if piece.token is not None:
            found[piece.prompt].append(piece.token.id)
        if number in (0, 50):
            time.sleep(0.3)
    assert made == [None]
    for number, prompt_ids in enumerate([[1, 2], [3]]):
        assert found[number] == alone(lm, replace(request(count=100), prompt_ids=prompt_ids))


@pytest.mark.parametrize("seconds", [-1, "x", float("nan"), True])
def test_a_time_to_wait_that_is_none_is_refused(lm, seconds):
    with pytest.raises(InputError, match="reader_timeout"):
        Engine(lm, slots=1, reader_timeout=seconds)
