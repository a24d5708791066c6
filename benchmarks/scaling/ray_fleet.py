"""A fleet on Ray Serve: replicas that are killed, and replaced, while clients talk to it.

    python -m benchmarks.scaling.ray_fleet --bundle BUNDLE --out benchmarks/results/ray_fleet.json

Two replicas behind Ray's proxy, one store of sessions, all on this machine. `openai`: the openai
client streams through the proxy. `failure`: while conversations go on, one replica is killed by
SIGKILL; every answer is compared with that of the same conversation undisturbed. `update`: the
application is deployed again while clients stream; every request is to succeed. `departure`: a
client hangs up, and its slot is free again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.support.conversations import offline_turns
from benchmarks.support.result import write_result
from benchmarks.support.script import run_script
from lminf_export.bundle.folder import Bundle
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load

NAME = "demo"
CHAT = "/v1/chat/completions"
QUESTIONS = ("Tell me of Elizabeth.", "And of her sister?", "And then?", "Who said so?", "Why?")
PLACES = ("Bath", "London", "Meryton", "Derbyshire")
# A process of Ray's has its actor's name.
REPLICA = "ray::ServeReplica:default:lminf"
MOST_TRIES = 200


@dataclass
class Talk:
    """One conversation, as its client has it."""

    name: str
    turns: list[list[dict[str, str]]]
    answers: list[str] = field(default_factory=list)
    turn: int = 0
    retries: int = 0
    longest: float = 0.0


def replicas() -> dict[int, psutil.Process]:
    """Return the processes of the fleet's replicas by their ids."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[0].startswith(REPLICA):
            found[process.pid] = process
    return found


async def wait_for(holds: Any, seconds: float = 60.0) -> float:
    """Wait until something holds; return how long that took."""
    begun = time.perf_counter()
    while not holds():
        if time.perf_counter() - begun > seconds:
            raise TimeoutError("it never held")
        await asyncio.sleep(0.05)
    return time.perf_counter() - begun


async def answer(http: httpx.AsyncClient, talk: Talk, turn: list[dict[str, str]], n: int) -> str:
    """Return the answer to a turn, asked for again where a server has gone.

    A client that has lost the end of an answer asks where its session stands, and sends the turn
    again if the answer is no part of it.
    """
    body = {"messages": turn, "max_tokens": n, "temperature": 0, "stream": True}
    for _ in range(MOST_TRIES):
        text, number = "", None
        # An answer that is there already is not asked for twice.
        headers = {"x-session-id": talk.name, "x-session-turn": str(talk.turn + 1)}
        try:
            async with http.stream("POST", CHAT, json=body, headers=headers) as response:
                if response.status_code == 200:
                    number = int(response.headers["x-session-turn"])
                    async for line in response.aiter_lines():
                        if line == "data: [DONE]":
                            talk.turn = number
                            return text
                        if line.startswith("data: "):
                            chunk = json.loads(line[6:])
                            if "error" in chunk:
                                break
                            text += chunk["choices"][0]["delta"].get("content") or ""
                else:
                    await response.aread()
                    if response.status_code not in (409, 429, 500, 502, 503):
                        raise AssertionError(f"{response.status_code} {response.text}")
        except httpx.HTTPError:
            pass  # the replica has gone, and its connection
        talk.retries += 1
        await asyncio.sleep(0.1)
        if number is not None:
            talk.turn = await stands_at(http, talk.name)
            if talk.turn == number:
                return text
    raise TimeoutError(f"{talk.name} was never answered")


async def stands_at(http: httpx.AsyncClient, name: str) -> int:
    """Return the turn of a session, 0 for none."""
    for _ in range(MOST_TRIES):
        try:
            found = await http.get(f"/v1/sessions/{name}", headers={"x-session-id": name})
            if found.status_code == 404:
                return 0
            if found.status_code == 200:
                return int(found.json()["turn"])
        except httpx.HTTPError:
            pass
        await asyncio.sleep(0.1)
    raise TimeoutError(f"nobody knows of {name}")


async def hold(http: httpx.AsyncClient, talk: Talk, tokens: int) -> None:
    """Hold a conversation to its end."""
    for turn in talk.turns:
        begun = time.perf_counter()
        talk.answers.append(await answer(http, talk, turn, tokens))
        talk.longest = max(talk.longest, time.perf_counter() - begun)


async def failure(url: str, lm: LanguageModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill a replica while conversations go on; return what became of them."""
    talks = [
        Talk(f"talk-{i}", [said(f"{q} ({PLACES[i % 4]}, {i})") for q in QUESTIONS])
        for i in range(arguments.conversations)
    ]
    wanted = arguments.conversations * len(QUESTIONS)
    async with client(url) as http:
        tasks = [asyncio.create_task(hold(http, talk, arguments.tokens)) for talk in talks]
        # A third of all turns are complete, and answers are being written.
        await wait_for(lambda: sum(len(talk.answers) for talk in talks) > wanted / 3, 600)
        before = replicas()
        victim = sorted(before)[0]
        os.kill(victim, signal.SIGKILL)
        complete = sum(len(talk.answers) for talk in talks)
        begun = time.perf_counter()
        await asyncio.gather(*tasks)
        all_ended = time.perf_counter() - begun
        await wait_for(lambda: len(replicas().keys() - {victim}) == len(before), 120)
    exact = sum(
        talk.answers == offline_turns(lm, *talk.turns, count=arguments.tokens) for talk in talks
    )
    return {
        "replicas": len(before),
        "conversations": len(talks),
        "turns_each": len(QUESTIONS),
        "tokens_a_turn": arguments.tokens,
        "turns_complete_when_killed": complete,
        "turns_asked_again": sum(talk.retries > 0 for talk in talks),
        "longest_answer_s": round(max(talk.longest for talk in talks), 2),
        "seconds_from_kill_to_last_answer": round(all_ended, 2),
        "conversations_equal_to_undisturbed": exact,
    }


async def update(url: str, deploy: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Deploy again while clients stream; return how many requests there were, and failed."""
    counts = {"requests": 0, "failed": 0}
    is_over = False

    async def stream(number: int, http: httpx.AsyncClient) -> None:
        while not is_over:
            body = {
                "messages": said(f"{QUESTIONS[0]} ({number})"), "max_tokens": arguments.tokens * 4,
                "temperature": 0, "stream": True, "ignore_eos": True,
            }  # fmt: skip
            counts["requests"] += 1
            try:
                async with http.stream("POST", CHAT, json=body) as response:
                    lines = [line async for line in response.aiter_lines() if line]
                    if response.status_code != 200 or lines[-1] != "data: [DONE]":
                        raise ValueError(lines[-1][:200])
            except (httpx.HTTPError, ValueError, IndexError) as error:
                counts["failed"] += 1
                print(f"failed: {error!r}", file=sys.stderr)

    before = set(replicas())
    async with client(url) as http:
        tasks = [asyncio.create_task(stream(i, http)) for i in range(arguments.clients)]
        await asyncio.sleep(2)
        begun = time.perf_counter()
        await asyncio.to_thread(deploy)
        await wait_for(lambda: not before & set(replicas()), 300)
        seconds = time.perf_counter() - begun
        await asyncio.sleep(2)
        is_over = True
        await asyncio.gather(*tasks)
    return {
        "clients": arguments.clients,
        "replicas_replaced": len(before),
        "seconds": round(seconds, 1),
        **counts,
    }


async def departure(url: str) -> dict[str, Any]:
    """Hang up in the middle of an answer; return when its slot was free."""
    headers = {"x-session-id": "leaves"}  # the same replica tells of its slots
    body = {
        "messages": said(QUESTIONS[0]), "max_tokens": 100_000, "stream": True, "ignore_eos": True,
    }  # fmt: skip
    async with client(url) as http:
        async with http.stream("POST", CHAT, json=body, headers=headers) as response:
            lines = response.aiter_lines()  # held, since the connection closes with it
            for _ in range(20):
                await anext(lines)
            busy = await slots_busy(http, headers)
        begun = time.perf_counter()
        while await slots_busy(http, headers):
            if time.perf_counter() - begun > 30:
                raise TimeoutError("the slot of a client that has gone is still busy")
            await asyncio.sleep(0.01)
        return {"busy_before": busy, "free_after_ms": round((time.perf_counter() - begun) * 1e3)}


async def slots_busy(http: httpx.AsyncClient, headers: dict[str, str]) -> float:
    """Return how many slots of a replica are busy."""
    text = (await http.get("/metrics", headers=headers)).text
    (line,) = [line for line in text.splitlines() if line.startswith("lminf_slots_busy{")]
    return float(line.split()[1])


def through_openai(url: str, lm: LanguageModel, tokens: int) -> dict[str, Any]:
    """Stream by the openai client; return whether it is what the model writes by itself."""
    from openai import OpenAI

    messages: Any = said(QUESTIONS[0])
    api = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    chunks = list(
        api.chat.completions.create(
            model=NAME, messages=messages, max_tokens=tokens, temperature=0, stream=True
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return {
        "version": version("openai"),
        "chunks": len(chunks),
        "equal_to_offline": [text] == offline_turns(lm, messages, count=tokens),
    }


def said(text: str) -> list[dict[str, str]]:
    """Return what a user says, as messages."""
    return [{"role": "user", "content": text}]


def client(url: str) -> httpx.AsyncClient:
    """Return a client of many connections."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(120), limits=limits)


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def cluster(host: str = "127.0.0.1") -> Iterator[str]:
    """Run Ray on this machine, with its proxy, until the block ends; yield the proxy's URL here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    port = free_port()
    # Replicas share the cores, however few there are.
    ray.init(include_dashboard=False, num_cpus=8, log_to_driver=False)
    try:
        serve.start(http_options={"host": host, "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the fleet; return what was seen."""
    lm = load(arguments.bundle, threads=1)
    with tempfile.TemporaryDirectory() as folder, cluster() as url:
        from ray import serve

        from lminf_export.serve.ray import app

        secret = Path(folder) / "secret"
        secret.write_text(secrets.token_hex(32))
        given = {
            "bundle": str(Path(arguments.bundle).resolve()), "name": NAME, "replicas": 2,
            "threads": 1, "slots": 8, "session_secret_file": str(secret),
            "session_store": str(Path(folder) / "store"), "drain_seconds": 120,
        }  # fmt: skip

        def deploy(**changed: Any) -> None:
            serve.run(app(given | changed), route_prefix="/", blocking=False)

        deploy()
        return {
            "openai": through_openai(url, lm, arguments.tokens),
            "departure": asyncio.run(departure(url)),
            "failure": asyncio.run(failure(url, lm, arguments)),
            "update": asyncio.run(update(url, lambda: deploy(max_requests=400), arguments)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--clients", type=int, default=8, help="that stream during an update")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {
        "benchmark": "ray_fleet",
        **describe_bundle(Bundle.open(arguments.bundle).manifest),
        "ray": version("ray"),
        **measure(arguments),
        "environment": environment(),
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    run_script(main)
