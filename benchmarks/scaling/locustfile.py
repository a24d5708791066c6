"""Users of an OpenAI server, for locust: each streams one completion after another.

    locust -f benchmarks/scaling/locustfile.py --headless -u 8 -r 8 --run-time 60s \\
        --host http://127.0.0.1:8000 --json

`LMINF_LOAD_PROMPT` and `LMINF_LOAD_NEW` are tokens of a prompt and of an answer. Locust's own row
is of headers; the first event and the whole answer are rows of their own, the answer's tokens its
content length. An answer of another length is a failure.
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
        """Stream one completion."""
        body = {
            "prompt": [random.randrange(5, LARGEST_ID) for _ in range(PROMPT)],
            "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        begun = time.perf_counter()
        first, tokens = None, 0
        asked = self.client.post(PATH, json=body, stream=True, catch_response=True, name="headers")
        with asked as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            while (line := response._response.readline(b"\n").strip()) != b"data: [DONE]":
                first = first or time.perf_counter()
                if line.startswith(b'data: {"error"'):
                    response.failure(line.decode()[:200])
                    return
                if b'"usage":{' in line:
                    tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            if tokens != NEW:
                response.failure(f"{tokens} tokens instead of {NEW}")
                return
        ended = time.perf_counter()
        for name, end, size in (("first event", first or ended, 0), ("answer", ended, tokens)):
            self.environment.events.request.fire(
                request_type="SSE", name=name, response_time=(end - begun) * 1e3,
                response_length=size, exception=None, context={},
            )  # fmt: skip
