"""An engine beside the bare steps of its session, and HTTP beside the engine.

    python -m benchmarks.serving.overhead --bundle BUNDLE \\
        --out benchmarks/results/serving_overhead.json

Section `engine`: a loop of `session.step` and argmax over a batch of all slots, beside an engine
whose slots are all taken, in one process and by turns. Streams are read by a thread each, by
asyncio in one thread, or not read at all. The engine's time is that of whole turns of its thread;
the part it spends in steps (`EngineStats.step_seconds`) is given beside it. A step's own time
varies from turn to turn by more than the engine adds, so `scheduling` compares what is outside the
steps: the engine's, less the bare loop's, as a part of the bare step. `without_step` is the
processor time of both with a session whose step returns at once: what the scheduler's own code
costs while it is in the processor's caches.

Section `http`: tokens a second of as many streams, read from an engine by asyncio and from
`lminf serve`, whose clients run in this process. Sections that are not asked for stay in the file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

import lminf_export
from benchmarks.serving import servers
from benchmarks.serving.clients import Target, load, random_prompts
from benchmarks.support.result import write_result
from lminf_export.bundle.folder import Bundle
from lminf_export.runtime.batching import sequence
from lminf_export.runtime.batching.engine import Engine
from lminf_export.runtime.batching.request import Request
from lminf_export.runtime.batching.stats import EngineStats
from lminf_export.runtime.batching.stream import TokenStream
from lminf_export.runtime.cache import State
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.sampling import SamplingConfig
from lminf_export.runtime.session import Session

READERS = ("nobody", "threads", "asyncio")
GREEDY = SamplingConfig(temperature=0)
WARM = 64  # steps


class BareLoop:
    """`session.step` and argmax over a batch.

    Args:
        lm: whose session steps.
        rows: of the batch.
    """

    def __init__(self, lm: LanguageModel, rows: int) -> None:
        self.session, self.rows = lm.session, rows
        self.state = lm.session.new_state(rows, full=True)
        self.ones = np.ones(rows, np.int64)
        self.first = np.zeros((rows, 1), np.int64)

    def turn(self, steps: int) -> dict[str, float]:
        """Step a batch of new streams; return milliseconds of a turn, and of its step."""
        self.state.reset()
        ids = np.full((self.rows, 1), 5, np.int64)
        inside = 0.0
        for step in range(WARM + steps):
            start = time.perf_counter()
            if step == WARM:
                begun, busy, inside = start, time.thread_time(), 0.0
            logits = self.session.step(self.state, ids, self.ones, self.first)
            self.state.advance(self.ones)
            inside += time.perf_counter() - start
            ids[:, 0] = logits[:, 0].argmax(axis=1)
        found = {
            "turn": time.perf_counter() - begun,
            "processor": time.thread_time() - busy,
            "step": inside,
        }
        return {name: seconds / steps * 1e3 for name, seconds in found.items()}


class InstantSession:
    """A session whose steps return the same logits at once.

    Args:
        session: that makes states.
        logits: (rows, 1, V) float32.
    """

    def __init__(self, session: Session, logits: np.ndarray) -> None:
        self._session, self._logits = session, logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def step(
        self, state: State, input_ids: np.ndarray, new_length: np.ndarray, logits_index: np.ndarray
    ) -> np.ndarray:
        return self._logits[: len(input_ids), : logits_index.shape[1]]


def read_by_threads(streams: Sequence[TokenStream]) -> Callable[[], None]:
    """Let a thread read each stream; return what waits for them."""

    def read(stream: TokenStream) -> None:
        for _ in stream:
            pass

    threads = [threading.Thread(target=read, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    return lambda: [thread.join() for thread in threads] and None


def read_by_asyncio(streams: Sequence[TokenStream]) -> Callable[[], None]:
    """Let tasks of one event loop read the streams; return what waits for them."""

    async def read(stream: TokenStream) -> None:
        async for _ in stream:
            pass

    async def all_of_them() -> None:
        await asyncio.gather(*(read(stream) for stream in streams))

    thread = threading.Thread(target=lambda: asyncio.run(all_of_them()))
    thread.start()
    return thread.join


def read_by_nobody(streams: Sequence[TokenStream]) -> Callable[[], None]:
    """Leave the tokens where they are."""
    return lambda: None


READ = dict(zip(READERS, (read_by_nobody, read_by_threads, read_by_asyncio), strict=True))


def at_step(engine: Engine, goal: int) -> tuple[float, EngineStats, float]:
    """Wait for a number of steps; return the time, the counts, and the thread's processor time."""
    while (left := goal - engine.stats().steps) > 0:
        time.sleep(min(0.02, max(1e-4, left * 2e-4)))
    return time.perf_counter(), engine.stats(), engine_thread_time()


def engine_turn(engine: Engine, slots: int, steps: int, reader: str) -> dict[str, float]:
    """Fill all slots with new streams; return milliseconds of a turn, and of its step."""
    request = Request([5], max_new_tokens=None, sampling=GREEDY, stop_token_ids=frozenset())
    streams = [engine.submit(request) for _ in range(slots)]
    join = READ[reader](streams)
    while (stats := engine.stats()).active < slots or stats.prefilling:
        time.sleep(0.001)
    begun, first, used = at_step(engine, stats.steps + WARM)
    ended, last, used_then = at_step(engine, first.steps + steps)
    done = last.steps - first.steps
    for stream in streams:
        stream.cancel()
    join()
    while engine.stats().active:
        time.sleep(0.001)
    return {
        "turn": (ended - begun) / done * 1e3,
        "processor": (used_then - used) / done * 1e3,
        "step": (last.step_seconds - first.step_seconds) / done * 1e3,
    }


def engine_thread_time() -> float:
    """Processor time of the engine's thread, seconds; of the latest engine."""
    idents = [t.ident for t in threading.enumerate() if t.name == "lminf-engine"]
    assert idents[-1] is not None
    return time.clock_gettime(time.pthread_getcpuclockid(idents[-1]))


def measure_engine(lm: LanguageModel, arguments: argparse.Namespace) -> dict[str, Any]:
    bare = BareLoop(lm, arguments.slots)
    bares: list[dict[str, float]] = []
    found: dict[str, list[dict[str, float]]] = {reader: [] for reader in READERS}
    with Engine(lm, arguments.slots) as engine:
        bare.turn(arguments.steps)
        for _ in range(arguments.rounds):
            for reader in READERS:
                around = [bare.turn(arguments.steps)]
                turn = engine_turn(engine, arguments.slots, arguments.steps, reader)
                around.append(bare.turn(arguments.steps))
                whole, step = (
                    statistics.mean(one[name] for one in around) for name in ("turn", "step")
                )
                turn["overhead"] = turn["turn"] / whole - 1
                turn["scheduling"] = (turn["turn"] - turn["step"] - (whole - step)) / step
                found[reader].append(turn)
                bares += around
            say({reader: round(found[reader][-1]["scheduling"], 4) for reader in READERS})
    return {
        "without_step": without_step(lm, arguments),
        "bare": _row(bares),
        "readers": {
            reader: {
                **_row(turns),
                "scheduling": _median(turn["scheduling"] for turn in turns),
                "scheduling_of_rounds": [round(turn["scheduling"], 4) for turn in turns],
                "overhead": _median(turn["overhead"] for turn in turns),
                "overhead_of_rounds": [round(turn["overhead"], 4) for turn in turns],
            }
            for reader, turns in found.items()
        },
    }


def _row(turns: list[dict[str, float]]) -> dict[str, float]:
    return {
        "turn_ms": _median(turn["turn"] for turn in turns),
        "step_ms": _median(turn["step"] for turn in turns),
        "rest_ms": _median(turn["turn"] - turn["step"] for turn in turns),
    }


def without_step(lm: LanguageModel, arguments: argparse.Namespace) -> dict[str, float]:
    """Microseconds of processor time of a turn, and of the bare loop, where steps cost nothing."""
    logits = np.random.default_rng(0).standard_normal((arguments.slots, 1, lm.vocab_size))
    session = cast("Session", InstantSession(lm.session, logits.astype(np.float32)))
    instant = LanguageModel(lm.bundle, session)
    bare, loops, turns = BareLoop(instant, arguments.slots), [], []
    with Engine(instant, arguments.slots) as engine:
        for _ in range(arguments.rounds):
            loops.append(bare.turn(arguments.steps)["processor"] * 1e3)
            turn = engine_turn(engine, arguments.slots, arguments.steps, "nobody")
            turns.append(turn["processor"] * 1e3)
    return {"bare_us": _median(loops), "turn_us": _median(turns)}


def measure_http(lm: LanguageModel, arguments: argparse.Namespace) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"engine": [], "http": []}
    slots, new = arguments.slots, arguments.http_tokens
    server = servers.ours("lminf serve", arguments.bundle, arguments.threads, slots)
    with server, Engine(lm, slots) as engine:
        for number in range(arguments.rounds + 1):
            prompts = random_prompts(slots, 8, lm.vocab_size, number)
            server.sleep()
            requests = [
                Request(prompt, new, sampling=GREEDY, stop_token_ids=frozenset())
                for prompt in prompts
            ]
            begun = time.perf_counter()
            read_by_asyncio([engine.submit(request) for request in requests])()
            alone = slots * new / (time.perf_counter() - begun)
            server.wake()
            through = asyncio.run(_through_http(server, prompts, new))
            if number:  # the first round is for warming up
                rates["engine"].append(alone)
                rates["http"].append(through)
                say({"engine": round(alone, 1), "http": round(through, 1)})
    return {
        "streams": slots,
        "tokens_of_each": new,
        "tokens_per_second": {way: _median(found) for way, found in rates.items()},
        "http_over_engine": _median(
            a / b for a, b in zip(rates["http"], rates["engine"], strict=True)
        ),
    }


async def _through_http(server: servers.Server, prompts: list[list[int]], new: int) -> float:
    async with Target(server.url, server.kind) as target:
        begun = time.perf_counter()
        answers = await load(target, prompts, new)
        seconds = time.perf_counter() - begun
    if errors := [answer.error for answer in answers if answer.error is not None]:
        raise SystemExit(f"lminf serve: {errors[0]}")
    return len(prompts) * new / seconds


def _median(values: Any) -> float:
    return round(statistics.median(values), 4)


def say(what: dict[str, float]) -> None:
    print(what, file=sys.stderr, flush=True)


SECTIONS = {"engine": measure_engine, "http": measure_http}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000, help="of one turn")
    parser.add_argument("--http-tokens", type=int, default=1000, help="of each stream")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    # Streams that nobody reads must not pause, however late this process looks at their steps.
    sequence.MAILBOX_TOKENS = sys.maxsize
    lm = lminf_export.load(arguments.bundle, threads=arguments.threads)
    result: dict[str, Any] = {}
    if arguments.out is not None and arguments.out.is_file():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
    result |= {
        "benchmark": "serving_overhead",
        **describe_bundle(Bundle.open(arguments.bundle).manifest),
        "slots": arguments.slots,
        "threads": arguments.threads,
    }
    for name in arguments.sections:
        result[name] = SECTIONS[name](lm, arguments) | {
            "rounds": arguments.rounds,
            "steps": arguments.steps,
            "environment": environment(),
        }
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
