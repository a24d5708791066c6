"""One long stream over HTTP while other clients come and go: the server's memory, and its rate.

    python -m benchmarks.serving.long_stream --bundle BUNDLE \\
        --out benchmarks/results/serving_long_stream.json

A client reads one answer of 200,000 tokens. Others come by turns: some read their answer to its
end, some go on with a conversation, some hang up in the middle, some ask for what is refused. The
resident memory of the server is sampled all the while, and may not differ by more than 2 %. What
it fills once is filled before the stream begins: visits of all kinds come until the memory for kept
states (`--session-bytes`) is used up and prompts of all lengths have been read.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving import servers
from benchmarks.serving.clients import Answer, Target, random_prompts
from benchmarks.support.result import write_result
from lminf_export.bundle.folder import Bundle
from lminf_export.runtime.environment import describe_bundle, environment

# Tokens of the answers that others ask for; some hang up after as many events.
SHORT = 64
HANG_UP = 10
CONVERSATIONS = 4
KINDS = ("answered", "hung_up", "refused", "failed")
LENGTHS = 20  # of their prompts, 1 … 286 tokens
BUCKETS = 20


@dataclass
class Watch:
    """Samples of a server: (seconds, bytes) of its memory."""

    samples: list[tuple[float, int]] = field(default_factory=list)

    async def run(self, server: servers.Server, seconds: float) -> None:
        begun = time.perf_counter()
        while True:
            self.samples.append((time.perf_counter() - begun, server.rss))
            await asyncio.sleep(seconds)


class Visitors:
    """Clients that come and go until they are cancelled.

    Args:
        name: that begins those of their conversations.
        target: that they ask.
        vocab_size: of its model.
        pause: seconds between one and the next.
    """

    def __init__(self, name: str, target: Target, vocab_size: int, pause: float) -> None:
        self.name, self.target = name, target
        self.vocab_size, self.pause = vocab_size, pause
        self.number = 0
        self.counts = dict.fromkeys(KINDS, 0)
        self.first_ms: list[float] = []

    async def run(self, visits: int | None = None) -> None:
        """Come and go until cancelled, or so many times without a pause."""
        numbers = count(self.number) if visits is None else range(visits)
        for number in numbers:
            self.number = number + 1
            length = 1 + number % LENGTHS * 300 // LENGTHS
            (prompt,) = random_prompts(1, length, self.vocab_size, number)
            if number % 5 == 4:
                answer = await self.target.complete([-1], SHORT, exact=False)
                self._count("refused" if (answer.error or "").startswith("HTTP 400") else "failed")
            elif number % 5 == 2:
                answer = await self.target.complete(
                    prompt, 100 * SHORT, exact=False, most_events=HANG_UP
                )
                self._count("hung_up" if answer.error is None else "failed", answer)
            else:
                name = f"{self.name}-{number % CONVERSATIONS}"
                headers = {"x-session-id": name} if number % 5 == 1 else {}
                answer = await self.target.complete(prompt, SHORT, headers=headers)
                self._count("answered" if answer.error is None else "failed", answer)
            if visits is None:
                await asyncio.sleep(self.pause)

    def _count(self, what: str, answer: Answer | None = None) -> None:
        self.counts[what] += 1
        if answer is not None and answer.arrivals:
            self.first_ms.append(answer.first * 1e3)


async def measure(
    server: servers.Server, vocab_size: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Read the stream beside the others; return what was seen."""
    watch = Watch()
    async with Target(server.url, server.kind) as target:
        groups = [
            Visitors(f"visitor-{i}", target, vocab_size, arguments.pause)
            for i in range(arguments.visitors)
        ]
        await asyncio.gather(*(group.run(arguments.warm_up_visits) for group in groups))
        (prompt,) = random_prompts(1, 16, vocab_size, 0)
        tasks = [asyncio.create_task(watch.run(server, arguments.sample_seconds))]
        tasks += [asyncio.create_task(group.run()) for group in groups]
        try:
            answer = await target.complete(prompt, arguments.tokens)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ended:
        if isinstance(end, Exception):
            raise end
    return {
        "answer": answered(answer, arguments.tokens),
        "memory": flatness(watch.samples),
        "visitors": {
            "at_once": arguments.visitors,
            "of_each_before": arguments.warm_up_visits,
            **{kind: sum(group.counts[kind] for group in groups) for kind in KINDS},
            "first_token_ms": _median([ms for group in groups for ms in group.first_ms]),
        },
    }


def answered(answer: Answer, tokens: int) -> dict[str, Any]:
    """Return the long answer's counts and its rate over position, by shares of its events."""
    found: dict[str, Any] = {
        "tokens": answer.new_tokens,
        "asked_for": tokens,
        "error": answer.error,
        "seconds": round(answer.ended - answer.begun, 2),
        "events": len(answer.arrivals),
    }
    if answer.error is None and len(answer.arrivals) > BUCKETS:
        # An event holds a token, or a few; the same share of them at every position.
        parts = np.array_split(np.array(answer.arrivals), BUCKETS)
        per_event = answer.new_tokens / len(answer.arrivals)
        found["tokens_per_second_by_position"] = [
            round(per_event * (len(part) - 1) / (part[-1] - part[0]), 1) for part in parts
        ]
    return found


def flatness(samples: list[tuple[float, int]]) -> dict[str, Any]:
    """Return how far memory is from flat.

    Args:
        samples: (seconds, bytes).
    """
    sizes = [size for _, size in samples]
    middle = statistics.median(sizes)
    every = max(1, len(samples) // 100)
    return {
        "samples": len(samples),
        "median_bytes": round(middle),
        "least_bytes": min(sizes),
        "most_bytes": max(sizes),
        "spread": round((max(sizes) - min(sizes)) / middle, 5),
        "last_over_first": round(_tenth(sizes, -1) / _tenth(sizes, 0), 5),
        "rss_bytes_by_second": [[round(at, 1), size] for at, size in samples[::every]],
    }


def _tenth(values: list[int], which: int) -> float:
    """The median of the first or last tenth."""
    count = max(1, len(values) // 10)
    return statistics.median(values[-count:] if which else values[:count])


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--visitors", type=int, default=3, help="that come and go side by side")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two visits")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--session-bytes", type=int, default=32 << 20, help="of kept states")
    parser.add_argument("--warm-up-visits", type=int, default=200, help="of each visitor")
    parser.add_argument("--sample-seconds", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    manifest = Bundle.open(arguments.bundle).manifest
    bundle, kept = arguments.bundle, ("--session-bytes", str(arguments.session_bytes))
    with servers.ours("lminf serve", bundle, arguments.threads, arguments.slots, *kept) as server:
        found = asyncio.run(measure(server, manifest.vocab_size, arguments))
    result = {
        "benchmark": "serving_long_stream",
        **describe_bundle(manifest),
        "slots": arguments.slots,
        "threads": arguments.threads,
        "session_bytes": arguments.session_bytes,
        **found,
        **environment(),
    }
    write_result(arguments.out, result)
    if found["answer"]["error"] is not None:
        sys.exit(f"the stream ended early: {found['answer']['error']}")


if __name__ == "__main__":
    main()
