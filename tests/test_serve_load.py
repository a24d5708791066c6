"""A server under load: clients that come, go, are killed or talk nonsense, and its end."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest

from tests.support import serving
from tests.support.serving import COMPLETIONS, ask, events, offline_text, wait_until

PROMPTS = ["It is a truth", "Call me", "In the beginning", "Elizabeth was", "My dear", "Sir,"]
STREAM = "/v1/completions"
_READER = """
import sys, httpx
body = {"prompt": "It is", "max_tokens": 100000, "stream": True, "ignore_eos": True}
with httpx.stream("POST", sys.argv[1] + "/v1/completions", json=body, timeout=60) as response:
    for line in response.iter_lines():
        if line:
            print("reading", flush=True)
"""


async def well_formed(client, prompt, stream, wanted):
    body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": stream}
    if not stream:
        found = (await client.post(STREAM, json=body)).json()
        assert found["choices"][0]["text"] == wanted
        return
    text = ""
    async with client.stream("POST", STREAM, json=body) as response:
        *chunks, done = events(iter([line async for line in response.aiter_lines()]))
    assert done == "[DONE]"
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == wanted


async def disconnecting(client, stream):
    body = {"prompt": "My dear", "max_tokens": 100000, "stream": stream, "ignore_eos": True}
    if stream:
        async with client.stream("POST", STREAM, json=body) as response:
            async for _ in response.aiter_lines():
                break
    else:
        body["max_tokens"] = 10000
        with pytest.raises(httpx.ReadTimeout):
            await client.post(STREAM, json=body, timeout=httpx.Timeout(60, read=0.3))


async def senseless(client, chosen):
    body = chosen.choice([b"{", b"\xff\xfe", b'{"prompt": []}', b'{"prompt": "a", "n": -1}'])
    assert (await client.post(STREAM, content=body)).status_code == 400


async def exceeding(client):
    body = {"prompt": "a", "max_tokens": 10**9}
    assert (await client.post(STREAM, json=body)).status_code == 400


async def all_kinds(url, texts, rounds):
    """Send 64 clients' requests, each several after another."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def one(number):
            chosen = random.Random(number)
            for _ in range(rounds):
                kind = chosen.random()
                if kind < 0.55:
                    prompt = chosen.choice(PROMPTS)
                    await well_formed(client, prompt, chosen.random() < 0.5, texts[prompt])
                elif kind < 0.75:
                    await disconnecting(client, chosen.random() < 0.7)
                elif kind < 0.9:
                    await senseless(client, chosen)
                else:
                    await exceeding(client)

        await asyncio.gather(*(one(number) for number in range(64)))


@pytest.mark.slow
def test_sixty_four_clients_on_four_slots(demo_bundle, demo_lm):
    texts = {prompt: offline_text(demo_lm, prompt, 24) for prompt in PROMPTS}
    options = ("--slots", "4", "--threads", "1")
    with serving.server_process(demo_bundle, *options) as server:
        memory = psutil.Process(server.process.pid).memory_info
        asyncio.run(all_kinds(server.url, texts, 2))
        before = memory().rss
        asyncio.run(all_kinds(server.url, texts, 3))
        assert memory().rss < 1.1 * before

        def busy():
            text = httpx.get(f"{server.url}/metrics").text
            names = ("lminf_slots_busy", "lminf_queue_length", "lminf_parked{")
            return [x for x in text.splitlines() if x.startswith(names) and x[-3:] != "0.0"]

        wait_until(lambda: not busy())
        code, stderr = server.end()
    assert (code, stderr) == (0, "")


def test_a_client_that_is_killed_frees_its_slot(demo_lm):
    with serving.server_thread(demo_lm, slots=1) as server:
        reader = subprocess.Popen(
            [sys.executable, "-c", _READER, server.url], stdout=subprocess.PIPE, text=True
        )
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        assert server.stats().active == 1
        os.kill(reader.pid, signal.SIGKILL)
        killed = time.monotonic()
        wait_until(lambda: server.stats().active == 0)
        assert time.monotonic() - killed < 2
        reader.communicate()
        found = serving.post(server.url, STREAM, prompt="Sir,", max_tokens=5, temperature=0)
        assert found.json()["choices"][0]["text"] == offline_text(demo_lm, "Sir,", 5)


def test_a_client_that_goes_before_its_answer_frees_its_slot(demo_lm):
    with serving.server_thread(demo_lm, slots=1) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                server.url + STREAM, timeout=0.5,
                json={"prompt": "It is", "max_tokens": 100000, "ignore_eos": True},
            )  # fmt: skip
        wait_until(lambda: server.stats().active == 0, 2)


def read_stream(url: str, **body) -> list:
    """Read a stream to its end, whatever that is; events must be whole."""
    body = {"prompt": "It is", "stream": True, "ignore_eos": True, **body}
    with httpx.stream("POST", url + STREAM, json=body, timeout=60) as response:
        return list(events(response.iter_lines()))


async def signalled(server, budget, sent=1):
    """Start long and short streams, send SIGTERM amid them; return what each got."""
    tasks = [
        asyncio.create_task(asyncio.to_thread(read_stream, server.url, max_tokens=count))
        for count in (40, 100_000, 60, 100_000)
    ]
    await asyncio.sleep(0.5)
    async with httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.get("/readyz")).status_code == 200
        for _ in range(sent):
            server.process.send_signal(signal.SIGTERM)
        if sent == 1:
            await asyncio.sleep(0.1)
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/healthz")).status_code == 200
            refused = await client.post(STREAM, json={"prompt": "a"})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
    return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.slow
def test_a_signal_lets_streams_finish_or_tells_them(demo_bundle):
    options = ("--shutdown-seconds", "1", "--threads", "1", "--slots", "4")
    with serving.server_process(demo_bundle, *options) as server:
        found = asyncio.run(signalled(server, 1))
        stderr = server.process.communicate(timeout=30)[1]
        assert (server.process.returncode, stderr) == (0, "")
    for stream in (found[0], found[2]):
        assert stream[-1] == "[DONE]"
        assert stream[-2]["choices"][0]["finish_reason"] == "length"
    for stream in (found[1], found[3]):
        assert json.dumps(stream[-1]) == json.dumps(
            {
                "error": {
                    "message": "the server is shutting down",
                    "type": "server_error",
                    "param": None,
                    "code": "shutting_down",
                }
            }
        )


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.03, 0.1, 0.25])
def test_a_signal_while_a_prompt_is_read_cuts_no_stream(demo_bundle, delay):
    with serving.server_process(demo_bundle, "--threads", "1") as server:
        body = {"prompt": "It is a truth, " * 20_000, "max_tokens": 4, "stream": True}
        told = []

        def ask():
            with httpx.stream("POST", server.url + STREAM, json=body, timeout=60) as response:
                told.extend((response.status_code, response.read().decode()))

        client = threading.Thread(target=ask)
        client.start()
        time.sleep(delay)
        server.process.send_signal(signal.SIGTERM)
        client.join(60)
        assert server.process.wait(60) == 0
    status, text = told
    assert text.endswith("data: [DONE]\n\n") if status == 200 else "shutting_down" in text


def test_a_second_signal_ends_at_once(demo_bundle):
    with serving.server_process(demo_bundle, "--shutdown-seconds", "60") as server:
        start = time.monotonic()

        async def twice():
            task = asyncio.create_task(
                asyncio.to_thread(read_stream, server.url, max_tokens=100_000)
            )
            await asyncio.sleep(0.5)
            server.process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.3)
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGINT)
            return await asyncio.gather(task, return_exceptions=True)

        asyncio.run(twice())
        assert server.process.wait(10) == 128 + signal.SIGINT
        assert time.monotonic() - start < 20


def test_events_are_no_closer_than_they_may_be(demo_lm):
    """Tokens of a fast model come together; the first one, and a last one, at once."""
    counts = {}
    for seconds in (0.0, 0.05):
        with serving.server_thread(demo_lm, event_seconds=seconds) as server:
            body = {"prompt": "It is a truth", "max_tokens": 60, "temperature": 0, "stream": True}
            begun = time.perf_counter()
            with httpx.stream("POST", server.url + COMPLETIONS, json=body) as response:
                lines = [x for x in response.iter_lines() if x.startswith("data: {")]
            taken = time.perf_counter() - begun
            texts = [json.loads(x[6:])["choices"][0]["text"] for x in lines]
            assert "".join(texts) == offline_text(demo_lm, "It is a truth", 60)
            counts[seconds] = len(lines)
            if seconds:
                assert len(lines) <= taken / seconds + 3
            one = time.perf_counter()
            ask(server.url, None, "It is", path=COMPLETIONS, max_tokens=1)
            assert time.perf_counter() - one < 5
    assert counts[0.05] < counts[0.0]
