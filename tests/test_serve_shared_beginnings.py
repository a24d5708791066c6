"""Prompts that begin alike: the third one reads only what is its own, and gets the same bits."""

from __future__ import annotations

import numpy as np
import pytest

from lminf_export.serve.rolling import RollingHash, ids_bytes
from lminf_export.serve.shared_beginnings import SharedBeginnings
from tests.support import serving
from tests.support.serving import COMPLETIONS, ask, cached, content, offline_answer

SYSTEM = {"role": "system", "content": "And it came to pass in those days, " * 40}


def question(number):
    return [SYSTEM, {"role": "user", "content": f"Tell me of the {number}. day."}]


@pytest.fixture(scope="module")
def server(demo_lm):
    with serving.server_thread(demo_lm, slots=2, prefix_bytes=1 << 26) as server:
        yield server


@pytest.mark.slow
def test_a_system_prompt_that_chats_share_is_read_twice(server, demo_lm):
    chunk = demo_lm.bundle.manifest.lambda_config.chunk_size
    found = []
    for number in range(6):
        session = f"s{number}" if number > 3 else None
        answer = ask(server.url, session, question(number), max_tokens=12)
        if session is not None:
            assert answer.headers["x-session-state"] == "new"
        found.append(cached(answer))
        assert content(answer) == offline_answer(demo_lm, question(number), 12)
    shared = found[-1]
    assert shared >= chunk
    assert shared % chunk == 0
    assert found == [0, 0, shared, shared, shared, shared]


@pytest.mark.slow
def test_prompts_of_ids_share_beginnings_of_whole_chunks_only(server, demo_lm):
    chunk = demo_lm.bundle.manifest.lambda_config.chunk_size
    ids = np.random.default_rng(0).integers(5, 4000, 3 * chunk).tolist()

    def reused(length, tail):
        answer = ask(server.url, None, [*ids[:length], *tail], path=COMPLETIONS, max_tokens=3)
        prompt = [*ids[:length], *tail]
        written = list(demo_lm.generate(prompt, max_new_tokens=3))
        assert content(answer) == "".join(demo_lm.codec.stream(written, after=prompt))
        return cached(answer)

    assert [reused(chunk + 7, [n]) for n in (1, 2, 3)] == [0, 0, chunk]
    # More of it is known only once two prompts have had it.
    assert [reused(2 * chunk + 1, [n]) for n in (1, 2, 3)] == [chunk, chunk, 2 * chunk]
    # A beginning is shorter than its prompt: something must be left to read.
    assert [reused(2 * chunk, []), reused(2 * chunk, [])] == [chunk, chunk]
    assert [reused(chunk - 1, [n]) for n in (1, 2, 3)] == [0, 0, 0]


def test_another_key_shares_nothing(demo_lm):
    with serving.server_thread(demo_lm, prefix_bytes=1 << 26, api_keys=("one", "two")) as server:
        counts = [
            cached(ask(server.url, None, question(number), key, max_tokens=2))
            for number, key in enumerate(("one", "one", "two", "one", "two"))
        ]
    assert counts[:3] == [0, 0, 0]
    assert counts[3] > 0
    assert counts[4] == 0


def test_few_of_many_prompts_that_come_at_once_keep_what_they_share():
    known = SharedBeginnings()
    kept = [n for n in range(1, 70) if known.note("a", list(range(9)), 8) is not None]
    assert kept == [2, 4, 8, 16, 32, 64]


def test_the_beginnings_that_are_known_are_bounded_and_of_one_scope(monkeypatch):
    monkeypatch.setattr("lminf_export.serve.shared_beginnings._MOST_KNOWN", 4)
    known = SharedBeginnings()
    ids = list(range(50))
    assert known.note("a", ids, 8) is None
    assert known.note("b", ids[:17], 8) is None
    # Of the six of "a" only the last two are left: four are known at most.
    found = known.note("a", ids[:41], 8)
    assert found == RollingHash().then(ids_bytes(ids[:40]))
    assert len(known._known) == 4
