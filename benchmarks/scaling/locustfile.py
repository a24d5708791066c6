"""Users of a server of OpenAI's API, for locust: each streams one completion after another.

    locust -f benchmarks/scaling/locustfile.py --headless -u 8 -r 8 --run-time 60s \\
        --host http://127.0.0.1:8000 --json

What they ask for is said by variables: `LMINF_LOAD_MODEL`, where the server has several or wants
one named; `LMINF_LOAD_KEY_FILE`, a file with its API key; `LMINF_LOAD_PROMPT` and `LMINF_LOAD_NEW`,
tokens of a prompt and of an answer; `LMINF_LOAD_LARGEST_ID`, below which prompts' ids are drawn.
Locust's own row is of headers; the first event and the whole answer are rows of their own, the
answer's tokens its content length. An answer that is torn or of another length is a failure.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from locust import FastHttpUser, constant, task

PROMPT = int(os.environ.get("LMINF_LOAD_PROMPT", "32"))
NEW = int(os.environ.get("LMINF_LOAD_NEW", "128"))
LARGEST_ID = int(os.environ.get("LMINF_LOAD_LARGEST_ID", "1000"))
MODEL = os.environ.get("LMINF_LOAD_MODEL")
KEY_FILE = os.environ.get("LMINF_LOAD_KEY_FILE")
PATH = "/v1/completions"


class TornAnswerError(Exception):
    """An answer is not what was asked for; with the reason."""


class Reader(FastHttpUser):
    """Reads an answer to its end, then asks for the next."""

    wait_time = constant(0)
    network_timeout = connection_timeout = 300.0

    @task
    def complete(self) -> None:
        """Stream one completion."""
        begun = time.perf_counter()
        asked = self.client.post(
            PATH, json=body(), headers=headers(), stream=True, catch_response=True, name="headers"
        )
        with asked as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            try:
                first, tokens = read(response._response.readline)
            except (TornAnswerError, OSError, HTTPException) as error:
                response.failure(str(error))
                return
        ended = time.perf_counter()
        for name, end, size in (("first event", first, 0), ("answer", ended, tokens)):
            self.environment.events.request.fire(
                request_type="SSE", name=name, response_time=(end - begun) * 1e3,
                response_length=size, exception=None, context={},
            )  # fmt: skip


def body() -> dict[str, Any]:
    """Return a request for a completion of so many tokens, whatever they are."""
    named = {} if MODEL is None else {"model": MODEL}
    return {
        **named,
        "prompt": [random.randrange(5, LARGEST_ID) for _ in range(PROMPT)],
        "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def headers() -> dict[str, str]:
    """Return the header with the key, if there is one."""
    if KEY_FILE is None:
        return {}
    return {"authorization": f"Bearer {Path(KEY_FILE).read_text(encoding='utf-8').split()[0]}"}


def read(readline: Callable[[bytes], bytes]) -> tuple[float, int]:
    """Read the events of an answer; return when the first one came, and the answer's tokens.

    Args:
        readline: of the stream, called with a line's end; returns nothing at the stream's.

    Raises:
        TornAnswerError: it ended before its last event, by an error, or has another length.
    """
    first, tokens = None, 0
    while line := readline(b"\n"):
        first = first or time.perf_counter()
        event = line.strip()
        if event == b"data: [DONE]":
            if tokens != NEW:
                raise TornAnswerError(f"{tokens} tokens instead of {NEW}")
            return first, tokens
        if event.startswith(b'data: {"error"'):
            raise TornAnswerError(event.decode()[:200])
        if b'"usage":{' in event:
            tokens = json.loads(event[6:])["usage"]["completion_tokens"]
    raise TornAnswerError("the stream ended before its last event")
