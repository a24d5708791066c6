"""Load on a server of OpenAI's API: clients side by side, prompts and answers of exact lengths.

    python -m benchmarks.serving.clients --url http://127.0.0.1:8000/v1 --kind lminf \
        --clients 8 --prompt-tokens 512 --new-tokens 256

Prompts are random token ids where the server takes ids (`--kind lminf`, `--kind llama-server`), so
their length is exact and every server of one model reads the same. For others a text of words is
made longer or shorter until the server counts as many tokens. An answer has exactly the asked
number of tokens since both servers know `ignore_eos`; elsewhere `--eos` gives ids that
`logit_bias` rules out. What the server counted is in the result, and a number other than the one
asked for is an error of that request.

Latencies between tokens are the times between events: a server may send several tokens in one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.support.result import write_result
from lminf_export.runtime.environment import environment

TIMEOUT = httpx.Timeout(900, connect=10)
KINDS = ("lminf", "llama-server", "other")
WORDS = ("river", "stone", "light", "house", "winter", "paper", "garden", "music", "window", "road")
Prompt = list[int] | str


@dataclass
class Answer:
    """One answer as it arrived; times of `time.perf_counter`, seconds."""

    begun: float
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    text: str = ""
    error: str | None = None

    @property
    def first(self) -> float:
        """Seconds to the first event that holds an answer."""
        return self.arrivals[0] - self.begun

    @property
    def gaps(self) -> list[float]:
        """Seconds between events."""
        return np.diff(self.arrivals).tolist()


class Target:
    """A server.

    Args:
        url: that ends in /v1.
        kind: whose server it is, see the module.
        model: its name there; by default the first of /models.
        eos: token ids that may not be written, for a server without `ignore_eos`.
        key: for the header `Authorization`.
    """

    def __init__(
        self, url: str, kind: str, model: str | None = None, eos: Sequence[int] = (), key: str = ""
    ) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.AsyncClient(
            base_url=url.rstrip("/") + "/",
            headers=headers,
            timeout=TIMEOUT,
            # A connection of its own for each request: an idle one may be closed while it is used.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,
        )
        self.kind, self.model = kind, model
        self.endless: dict[str, Any] = (
            {"logit_bias": {str(token): -100 for token in eos}}
            if kind == "other"
            else {"ignore_eos": True}
        )

    async def __aenter__(self) -> Target:
        if self.model is None:
            found = (await self.http.get("models")).raise_for_status().json()
            self.model = found["data"][0]["id"]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def complete(
        self,
        prompt: Prompt,
        new_tokens: int,
        *,
        headers: dict[str, str] | None = None,
        exact: bool = True,
        most_events: int | None = None,
        **more: Any,
    ) -> Answer:
        """Stream one completion.

        Args:
            prompt: token ids or a text.
            new_tokens: tokens of the answer.
            headers: beside those of every request.
            exact: a shorter answer is an error.
            most_events: hang up after so many events; None reads to the end.
            more: further fields of the request.
        """
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}, **self.endless, **more,
        }  # fmt: skip
        answer = Answer(time.perf_counter())
        request = self.http.stream("POST", "completions", json=body, headers=headers)
        try:
            async with request as response:
                if response.status_code != 200:
                    await response.aread()
                    answer.error = f"HTTP {response.status_code}: {response.text[:200]}"
                else:
                    await self._read(response, answer, most_events)
        except httpx.HTTPError as error:
            answer.error = f"{type(error).__name__}: {error}"[:200]
        answer.ended = time.perf_counter()
        if exact and answer.error is None and answer.new_tokens != new_tokens:
            answer.error = f"{answer.new_tokens} tokens instead of {new_tokens}"
        return answer

    async def _read(
        self, response: httpx.Response, answer: Answer, most_events: int | None
    ) -> None:
        async for line in response.aiter_lines():
            if not line.startswith("data:") or line == "data: [DONE]":
                continue
            now = time.perf_counter()
            event = json.loads(line[5:])
            if "error" in event:
                answer.error = str(event["error"])[:200]
                return
            if usage := event.get("usage"):
                answer.prompt_tokens = usage["prompt_tokens"]
                answer.new_tokens = usage["completion_tokens"]
            for choice in event.get("choices", ()):
                text = choice.get("text") or ""
                if text or choice.get("finish_reason") is None:
                    answer.arrivals.append(now)
                    answer.text += text
            if most_events is not None and len(answer.arrivals) >= most_events:
                return

    async def text_of(self, tokens: int, number: int) -> str:
        """Return a text that the server counts as so many tokens; another for each number.

        Raises:
            SystemExit: no text of these words has that length.
        """
        words = tokens
        for _ in range(12):
            order = np.random.default_rng(number).integers(len(WORDS), size=words)
            text = " ".join(WORDS[i] for i in order)
            answer = await self.complete(text, 1, exact=False)
            if answer.error is not None:
                raise SystemExit(f"the server answers a prompt of {words} words: {answer.error}")
            if answer.prompt_tokens == tokens:
                return text
            words = max(1, words + tokens - answer.prompt_tokens)
        raise SystemExit(f"no prompt of these words has {tokens} tokens; the server must take ids")


def random_prompts(
    count: int, tokens: int, vocab_size: int, seed: int, first: int | None = None
) -> list[list[int]]:
    """Return prompts of random ids, no two alike.

    Args:
        count: prompts.
        tokens: of each.
        vocab_size: ids are below it; those below 5 are left out, as are the last of a vocabulary,
            where special tokens stand.
        seed: of the numbers.
        first: the id that begins each, such as a beginning of text.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, max(6, vocab_size * 9 // 10), (count, tokens))
    if first is not None:
        ids[:, 0] = first
    return ids.tolist()


async def load(target: Target, prompts: Sequence[Prompt], new_tokens: int) -> list[Answer]:
    """Give every prompt to a client of its own, all at once; return their answers."""
    return list(await asyncio.gather(*(target.complete(p, new_tokens) for p in prompts)))


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return rates and latencies of answers that were written side by side."""
    good = [answer for answer in answers if answer.error is None and answer.arrivals]
    found: dict[str, Any] = {
        "answers": len(answers),
        "errors": [answer.error for answer in answers if answer.error is not None],
    }
    if not good:
        return found
    seconds = max(a.ended for a in good) - min(a.begun for a in good)
    new, read = sum(a.new_tokens for a in good), sum(a.prompt_tokens for a in good)
    # While all write: from the last first token to the first end.
    shared = min(a.arrivals[-1] for a in good) - max(a.arrivals[0] for a in good)
    gaps = np.concatenate([a.gaps for a in good]) * 1e3
    return found | {
        "seconds": round(seconds, 4),
        "prompt_tokens": read,
        "new_tokens": new,
        "new_tokens_per_second": round(new / seconds, 2),
        "tokens_per_second": round((new + read) / seconds, 2),
        "first_token_ms": {
            "median": _ms(np.median([a.first for a in good]) * 1e3),
            "largest": _ms(max(a.first for a in good) * 1e3),
        },
        "between_events_ms": {
            "median": _ms(np.median(gaps)),
            "p99": _ms(np.percentile(gaps, 99)),
        }
        if len(gaps)
        else None,
        "events": sum(len(a.arrivals) for a in good),
        "seconds_all_wrote": round(shared, 4),
    }


def _ms(value: Any) -> float:
    return round(float(value), 3)


def ids_of(arguments: argparse.Namespace, seed: int) -> list[list[int]]:
    numbers = (arguments.clients, arguments.prompt_tokens, arguments.vocab_size)
    return random_prompts(*numbers, seed, arguments.first_id)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    target = Target(arguments.url, arguments.kind, arguments.model, arguments.eos, arguments.key)
    async with target:
        rounds = []
        for number in range(arguments.rounds):
            prompts: list[Prompt]
            if arguments.kind == "other":
                first = (arguments.seed + number) * arguments.clients
                prompts = [
                    await target.text_of(arguments.prompt_tokens, first + i)
                    for i in range(arguments.clients)
                ]
            else:
                seed = arguments.seed + number
                prompts = [*ids_of(arguments, seed)]
            answers = await load(target, prompts, arguments.new_tokens)
            for answer in answers:
                if answer.error is None and answer.prompt_tokens != arguments.prompt_tokens:
                    answer.error = f"the prompt had {answer.prompt_tokens} tokens"
            rounds.append(summary(answers))
        return {
            "benchmark": "serving_clients",
            "kind": arguments.kind,
            "model": target.model,
            "clients": arguments.clients,
            "prompt_tokens": arguments.prompt_tokens,
            "new_tokens": arguments.new_tokens,
            "exactly_so_many_by": "logit_bias" if arguments.kind == "other" else "ignore_eos",
            "rounds": rounds,
            **environment(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="base of the API, ends in /v1")
    parser.add_argument("--kind", choices=KINDS, default="other")
    parser.add_argument("--model", help="its name at the server; default: the first there")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=1000, help="ids of prompts are below it")
    parser.add_argument("--first-id", type=int, help="id that begins every prompt")
    parser.add_argument("--eos", type=int, nargs="*", default=[], help="ids never to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    write_result(arguments.out, asyncio.run(run(arguments)))


if __name__ == "__main__":
    main()
