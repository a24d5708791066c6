"""Users of an OpenAI server for locust: each streams one completion after another.

    locust -f benchmarks/scaling/locustfile.py --headless -u 8 -r 8 --run-time 60s \\
        --host http://127.0.0.1:8000 --json

`LMINF_LOAD_PROMPT` and `LMINF_LOAD_NEW` are tokens of a prompt and of an answer. Beside locust's own
times of whole answers the first event of each is reported as a request of its own, `first event`,
and every answer's tokens as its content length. An answer of another length is a failure.
"""

from __future__ import annotations

import json
import os
import random
import time

from locust import FastHttpUser, constant, task

PROMPT = int(os.environ.get("LMINF_LOAD_PROMPT", "32"))
NEW = int(os.environ.get("LMINF_LOAD_NEW", "128"))
LARGEST_ID = 1000
PATH = "/v1/completions"


class Reader(FastHttpUser):
    """Reads an answer to its end, then asks for the next."""

    wait_time = constant(0)
    network_timeout = connection_timeout = 300.0

    @task
    def complete(self) -> None:
        body = {
            "prompt": [random.randrange(5, LARGEST_ID) for _ in range(PROMPT)],
            "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        begun = time.perf_counter()
        first, tokens, is_done, rest = None, 0, False, b""
        with self.client.post(
            PATH, json=body, stream=True, catch_response=True, name="headers"
        ) as r:
            if r.status_code != 200:
                r.failure(f"{r.status_code}")
                return
            while piece := r.raw.read(65536) if False else r.stream.read(8192):
                first = first or time.perf_counter()
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line == b"data: [DONE]":
                        is_done = True
                    elif b'"usage":{' in line:
                        tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            if not is_done or tokens != NEW:
                r.failure(f"{tokens} tokens instead of {NEW}")
        ended = time.perf_counter()
        for name, end, size in (("first event", first or ended, 0), ("answer", ended, tokens)):
            self.environment.events.request.fire(
                request_type="SSE", name=name, response_time=(end - begun) * 1e3,
                response_length=size, exception=None, context={},
            )  # fmt: skip
