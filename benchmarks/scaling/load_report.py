"""Load on `lminf serve` by locust, beside the bare engine.

    python -m benchmarks.scaling.load_report --bundle BUNDLE --locust PATH/TO/locust \\
        --out benchmarks/results/load_report.json

More users than slots stream one completion after another (`locustfile.py`); as many readers do the
same with an engine in this process, by asyncio. Both by turns, and one sleeps while the other runs.
Tokens a second are those that the engine's own counter grew by in a window in which all were busy;
times are locust's. Models of several bundles are measured one after the other and kept under their
names.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import lminf_export
from benchmarks.serving import servers
from benchmarks.support.result import write_result
from benchmarks.support.script import run_script
from lminf_export.bundle.folder import Bundle
from lminf_export.errors import InputError
from lminf_export.operator.settings import as_integer, as_number
from lminf_export.runtime.batching.engine import Engine
from lminf_export.runtime.batching.request import Request
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.sampling import SamplingConfig

NAME = "load_report"
WARM_SECONDS = 3.0


async def bare(lm: LanguageModel, arguments: argparse.Namespace) -> float:
    """Return tokens a second of readers of an engine."""
    rng = np.random.default_rng(0)

    async def read(engine: Engine) -> None:
        while True:
            prompt = rng.integers(5, largest_id(lm), arguments.prompt_tokens).tolist()
            request = Request(
                prompt, arguments.new_tokens, SamplingConfig(temperature=0),
                stop_token_ids=frozenset(),
            )  # fmt: skip
            async for _ in engine.submit(request):
                pass

    with Engine(lm, arguments.slots) as engine:
        readers = [asyncio.create_task(read(engine)) for _ in range(arguments.users)]
        await asyncio.sleep(WARM_SECONDS)
        begun, before = time.perf_counter(), engine.stats().new_tokens
        await asyncio.sleep(arguments.seconds)
        rate = (engine.stats().new_tokens - before) / (time.perf_counter() - begun)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    return rate


def largest_id(lm: LanguageModel) -> int:
    """Return the number below which prompts' ids are drawn; all models know small ones."""
    return min(1000, lm.vocab_size)


def loaded(
    server: servers.Server, ids: int, arguments: argparse.Namespace
) -> tuple[float, list[Any]]:
    """Let locust load the server; return tokens a second, and locust's rows.

    Args:
        server: that is loaded, and nobody else's.
        ids: below which prompts' ids are drawn.
        arguments: of the command line.

    Raises:
        InputError: locust ends before the server has written anything.
    """
    seconds = arguments.seconds + WARM_SECONDS + 3
    command = [
        arguments.locust, "-f", str(Path(__file__).with_name("locustfile.py")), "--headless",
        "-u", str(arguments.users), "-r", str(arguments.users), "--run-time", f"{seconds:.0f}s",
        "--host", server.url.removesuffix("/v1"), "--json", "--loglevel", "ERROR",
    ]  # fmt: skip
    variables = {
        "LMINF_LOAD_PROMPT": str(arguments.prompt_tokens),
        "LMINF_LOAD_NEW": str(arguments.new_tokens),
        "LMINF_LOAD_LARGEST_ID": str(ids),
    }
    locust = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **variables}
    )
    while not new_tokens(server):
        time.sleep(0.05)
        if locust.poll() is not None:
            raise InputError(f"{arguments.locust} ended with {locust.returncode}: no load came")
    first = new_tokens(server)
    while new_tokens(server) == first:  # this round's first tokens
        time.sleep(0.05)
    time.sleep(WARM_SECONDS)
    begun, before = time.perf_counter(), new_tokens(server)
    time.sleep(arguments.seconds)
    after, ended = new_tokens(server), time.perf_counter()
    output, _ = locust.communicate()
    return (after - before) / (ended - begun), json.loads(output)


def new_tokens(server: servers.Server) -> float:
    """Return the tokens that a server has written."""
    text = httpx.get(server.url.removesuffix("/v1") + "/metrics", trust_env=False).text
    (line,) = [x for x in text.splitlines() if x.startswith("lminf_new_tokens_total{")]
    return float(line.split()[1])


def row(rows: list[Any], name: str) -> dict[str, Any]:
    """Return what locust says of one kind of request, in milliseconds.

    Raises:
        InputError: there was none of that kind.
    """
    found = next((each for each in rows if each["name"] == name), None)
    if found is None:
        raise InputError(f"no {name} came in the time given: more seconds, or fewer new_tokens")
    times = sorted((float(ms), count) for ms, count in found["response_times"].items())
    values = np.repeat([ms for ms, _ in times], [count for _, count in times])
    return {
        "requests": found["num_requests"],
        "failures": found["num_failures"],
        "p50_ms": float(np.percentile(values, 50)) if len(values) else None,
        "p99_ms": float(np.percentile(values, 99)) if len(values) else None,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load one bundle; return rates and locust's report of the last round."""
    lm = lminf_export.load(arguments.bundle, threads=arguments.threads)
    version = version_of(arguments.locust)  # before minutes are spent on the rest
    rates: dict[str, list[float]] = {"engine": [], "http": []}
    with servers.ours("lminf", arguments.bundle, arguments.threads, arguments.slots) as server:
        for _ in range(arguments.rounds):
            server.sleep()
            rates["engine"].append(asyncio.run(bare(lm, arguments)))
            server.wake()
            rate, rows = loaded(server, largest_id(lm), arguments)
            rates["http"].append(rate)
    ratios = [http / engine for http, engine in zip(rates["http"], rates["engine"], strict=True)]
    return {
        **describe_bundle(Bundle.open(arguments.bundle).manifest),
        "threads": arguments.threads,
        "slots": arguments.slots,
        "users": arguments.users,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "tokens_per_second": {name: round(statistics.median(x), 1) for name, x in rates.items()},
        "http_over_engine": round(statistics.median(ratios), 3),
        "locust": {name: row(rows, name) for name in ("headers", "first event", "answer")},
        "locust_version": version,
        "environment": environment(),
    }


def version_of(locust: str) -> str:
    """Return locust's version.

    Raises:
        InputError: the command is no locust.
        OSError: there is no such command.
    """
    done = subprocess.run([locust, "--version"], capture_output=True, text=True, check=False)
    if not done.stdout.startswith("locust "):
        raise InputError(f"{locust} --version does not answer as locust does")
    return done.stdout.split()[1]


def earlier(out: Path | None) -> dict[str, Any]:
    """Return the result to which a model is added.

    Raises:
        InputError: the file is none of these.
    """
    if out is None or not out.is_file():
        return {"benchmark": NAME, "models": {}}
    try:
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        is_ours = found["benchmark"] == NAME
    except (ValueError, TypeError, KeyError):
        is_ours = False
    if not is_ours:
        raise InputError(f"{out} is no report of this benchmark: name another file, or remove it")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--name", help="of the result; the bundle's folder by default")
    parser.add_argument("--locust", default="locust", help="locust's command")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--users", type=int, default=16, help="more than slots: none is idle")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=30, help="of a window")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    for field in ("threads", "slots", "users", "prompt_tokens", "new_tokens", "rounds"):
        as_integer(field, getattr(arguments, field), 1, InputError)
    if as_number("seconds", arguments.seconds, InputError) <= 0:
        raise InputError(f"seconds={arguments.seconds}: must be above 0")
    result = earlier(arguments.out)
    name = arguments.name or arguments.bundle.resolve().name
    result["models"][name] = measure(arguments)
    write_result(arguments.out, result)


if __name__ == "__main__":
    run_script(main)
