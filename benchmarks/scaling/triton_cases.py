"""Cases for Triton: streams, sessions, clients that go, restarts; see `triton_run`.

`configs`: the server loads what is written for other backends. `parameters`: sampling as parameters
of requests. `unloading`: of the model, behind a request that Triton refused. `streams`: clients
stream side by side by gRPC; their texts and token ids are compared with those of the model by
itself. `sessions`: a text is written in one request, and again in several of a sequence.
`departure`: a client is killed by SIGKILL while it reads. `restart`: the server ends and starts
again over its folder of sessions. `rate`: tokens a second of streams through the server beside a
bare engine in this process, by turns.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lminf_export
from benchmarks.scaling.triton_client import Answer, Client
from benchmarks.scaling.triton_configs import configs
from benchmarks.scaling.triton_requests import parameters, unloading
from benchmarks.scaling.triton_server import ROOT, SERVER, TritonServer
from benchmarks.support.result import write_result
from lminf_export.bundle.folder import Bundle
from lminf_export.runtime.batching.engine import Engine
from lminf_export.runtime.batching.request import Request
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.sampling import SamplingConfig
from lminf_export.triton.repository import export_triton

# With a dot, which names of models often have.
NAME = "demo-1.0"
PROMPTS = (
    "It is a truth", "In the beginning", "The king said", "She went to", "There was a", "And the",
    "My dear", "When they had",
)  # fmt: skip
GREEDY = {"temperature": 0, "ignore_eos": True}
BUSY = "lminf_slots_busy"


def offline(lm: LanguageModel, prompt: str, count: int) -> tuple[str, list[int]]:
    """Return what a model writes by itself: text, and token ids."""
    ids = lm.codec.encode(prompt)
    written = list(lm.generate(ids, max_new_tokens=count, stop_token_ids=frozenset()))
    return "".join(lm.codec.stream(written, after=ids)), written


def side_by_side(address: str, prompts: Sequence[str], count: int) -> list[Answer]:
    """Stream to a client for each prompt, all at once."""
    answers = [Answer() for _ in prompts]

    def read(place: int) -> None:
        with Client(address, NAME) as client:
            answers[place] = client.ask(prompts[place], max_tokens=count, **GREEDY)

    threads = [threading.Thread(target=read, args=(place,)) for place in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def streams(server: TritonServer, lm: LanguageModel, count: int) -> dict[str, Any]:
    """Stream to eight clients side by side."""
    answers = side_by_side(server.grpc, PROMPTS, count)
    same = [
        (answer.text, answer.ids) == offline(lm, prompt, count)
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]
    return {
        "clients": len(PROMPTS),
        "tokens_each": count,
        "responses": sum(answer.parts for answer in answers),
        "equal_to_offline": sum(same),
    }


def sessions(server: TritonServer, lm: LanguageModel) -> dict[str, Any]:
    """Write a text in several requests of a sequence; begin and end sequences."""
    whole, _ = offline(lm, PROMPTS[0], 96)
    with Client(server.grpc, NAME) as client:
        parts = [client.ask(PROMPTS[0], sequence=7, start=True, max_tokens=32, **GREEDY)]
        parts += [client.ask("", sequence=7, max_tokens=32, **GREEDY) for _ in range(2)]
        named = client.ask(PROMPTS[1], sequence="a name", start=True, max_tokens=8, **GREEDY)
        again = client.ask(PROMPTS[0], sequence=7, start=True, max_tokens=32, **GREEDY)
        ended = client.ask("", sequence=7, end=True, max_tokens=8, **GREEDY)
        gone = client.ask("", sequence=7, max_tokens=8, **GREEDY)
        never = client.ask("x", sequence=8, max_tokens=8, **GREEDY)
        wrong = client.ask("x", max_tokens=0)
    return {
        "text_in_three_requests_equal": "".join(part.text for part in parts) == whole,
        "cached_tokens": [part.num_cached_tokens for part in parts],
        "named_sequence": named.error is None,
        "start_begins_anew": again.text == parts[0].text and again.num_cached_tokens == 0,
        "end_answers": ended.error is None and bool(ended.text),
        "errors": {"ended": gone.error, "never_begun": never.error, "wrong": wrong.error},
    }


def departure(server: TritonServer) -> dict[str, Any]:
    """Kill a client while it reads."""
    command = [sys.executable, "-m", "benchmarks.scaling.triton_cases", "--read", server.grpc]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    assert reader.stdout.readline().strip() == "reading"
    _wait(lambda: server.metric(BUSY) == 1)
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    begun = time.perf_counter()
    _wait(lambda: server.metric(BUSY) == 0)
    return {"busy_before": 1, "free_after_s": round(time.perf_counter() - begun, 2)}


def example(server: TritonServer, lm: LanguageModel) -> dict[str, bool]:
    """Run the client of examples/triton: two requests of one session."""
    client = ROOT / "examples" / "triton" / "client.py"
    command = [sys.executable, str(client), "--url", server.grpc, "--model", NAME]
    done = subprocess.run(
        [*command, "--tokens", "32", PROMPTS[0]], capture_output=True, text=True, check=True
    )
    return {"text_equal": done.stdout.rstrip("\n") == PROMPTS[0] + offline(lm, PROMPTS[0], 64)[0]}


def read_on(address: str) -> None:
    """Read an answer that does not end."""
    with Client(address, NAME) as client:
        for number, _ in enumerate(client.parts("It is", max_tokens=200_000, **GREEDY)):
            if number == 10:
                print("reading", flush=True)


def rate(server: TritonServer, lm: LanguageModel, rounds: int, count: int) -> dict[str, Any]:
    """Compare tokens a second with a bare engine's."""
    found: dict[str, list[float]] = {"engine": [], "triton": []}
    for _ in range(rounds):
        server.sleep()
        found["engine"].append(len(PROMPTS) * count / _timed(lambda: _engine(lm, count)))
        server.wake()
        found["triton"].append(
            len(PROMPTS) * count / _timed(lambda: side_by_side(server.grpc, PROMPTS, count))
        )
    medians = {name: round(statistics.median(each), 1) for name, each in found.items()}
    ratios = [t / e for t, e in zip(found["triton"], found["engine"], strict=True)]
    return {
        "rounds": rounds,
        "streams": len(PROMPTS),
        "tokens_each": count,
        "tokens_per_second": medians,
        "triton_over_engine": round(statistics.median(ratios), 3),
    }


def _engine(lm: LanguageModel, count: int) -> None:
    async def read(engine: Engine, prompt: str) -> None:
        request = Request(
            lm.codec.encode(prompt), count, SamplingConfig(temperature=0),
            stop_token_ids=frozenset(),
        )  # fmt: skip
        async for _ in engine.submit(request):
            pass

    async def all_of_them(engine: Engine) -> None:
        await asyncio.gather(*(read(engine, prompt) for prompt in PROMPTS))

    with Engine(lm, len(PROMPTS)) as engine:
        asyncio.run(all_of_them(engine))


def _timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _wait(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError("it never held")
        time.sleep(0.05)


def measure(bundle: Path, place: Path, rounds: int, count: int) -> dict[str, Any]:
    """Run the server out of an environment; return what was seen."""
    lm = lminf_export.load(bundle, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        repository = export_triton(
            bundle, Path(folder) / "repository", name=NAME, slots=len(PROMPTS),
            parameters={"threads": "1", "session_folder": str(Path(folder) / "sessions")},
        )  # fmt: skip
        with TritonServer(place, repository, (NAME,)) as server:
            found = {
                "configs": configs(lm.bundle.manifest, place),
                "streams": streams(server, lm, count),
                "sessions": sessions(server, lm),
                "departure": departure(server),
                "example": example(server, lm),
                "parameters": parameters(server, NAME, PROMPTS[0], offline(lm, PROMPTS[0], 4)[0]),
            }
            if rounds:
                found["rate"] = rate(server, lm, rounds, count)
            with Client(server.grpc, NAME) as client:
                before = client.ask(PROMPTS[0], sequence=9, start=True, max_tokens=32, **GREEDY)
        with (
            TritonServer(place, repository, (NAME,)) as server,
            Client(server.grpc, NAME) as client,
        ):
            after = client.ask("", sequence=9, max_tokens=32, **GREEDY)
            client.close()
            found["unloading"] = unloading(server, NAME)
        found["restart"] = {
            "text_equal": before.text + after.text == offline(lm, PROMPTS[0], 64)[0],
            "cached_tokens": after.num_cached_tokens,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--environment", type=Path, help="that has the server")
    parser.add_argument("--rounds", type=int, default=5, help="of `rate`")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--read", metavar="ADDRESS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read is not None:
        read_on(arguments.read)
        return
    result = {
        "benchmark": "triton_run",
        **describe_bundle(Bundle.open(arguments.bundle).manifest),
        "server": SERVER,
        "tritonclient": version("tritonclient"),
        **measure(arguments.bundle, arguments.environment, arguments.rounds, arguments.tokens),
        "environment": environment(),
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
