"""Servers for tests: as a process of their own, or in a thread; and what they should answer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.support.conversations import offline_turns as offline_turns
from lminf_export.runtime.chat_template import ChatTemplate
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.serve.app import create_app
from lminf_export.serve.run import DrainingServer, address_of, bound_socket, server_config
from lminf_export.serve.served_model import ServedModel
from lminf_export.serve.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[2]
NAME = "demo"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_START_SECONDS = 60


@dataclass
class Process:
    """A running `lminf serve`."""

    url: str
    process: subprocess.Popen[str]

    def end(self, sent: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; return the exit code and what was written to stderr."""
        self.process.send_signal(sent)
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr


@contextmanager
def server_process(
    bundle: Path,
    *options: str,
    program: tuple[str, ...] = ("-m", "lminf_export.cli.main"),
    **variables: str,
) -> Iterator[Process]:
    """Run `lminf serve`, or what stands for it, until the block ends."""
    command = [
        sys.executable, *program, "serve", str(bundle), "--port", "0", "--name", NAME, *options,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise AssertionError(f"no server: {line!r} {process.communicate()[1]}")
        yield Process(found.group(), process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


@dataclass
class Local:
    """A server in a thread of this process."""

    url: str
    app: Any

    @property
    def model(self) -> ServedModel:
        return next(iter(self.app.state.serving.models.values()))

    def stats(self) -> Any:
        return self.model.engine.stats()


@contextmanager
def server_thread(
    lm: LanguageModel, more: Mapping[str, LanguageModel] | None = None, **limits: Any
) -> Iterator[Local]:
    """Serve a model, and more by their names, in a thread until the block ends."""
    settings = ServeSettings(**limits)
    with bound_socket("127.0.0.1", 0) as bound:
        url = address_of(bound)
        served = {NAME: lm, **(more or {})}
        models = {name: ServedModel.of(name, model, settings) for name, model in served.items()}
        app = create_app(models, settings)
        started = threading.Event()
        server = DrainingServer(server_config(app, settings), app.state.serving, started.set)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            assert started.wait(_START_SECONDS)
            yield Local(url, app)
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


def offline_text(lm: LanguageModel, prompt: str, count: int, stop: tuple[str, ...] = ()) -> str:
    """Return what a model writes by itself, greedily."""
    ids = lm.codec.encode(prompt)
    written = lm.generate(ids, max_new_tokens=count)
    return "".join(lm.codec.stream(written, after=ids, stop=stop))


def ask(
    url: str,
    session: str | None,
    messages: Any,
    key: str | None = None,
    path: str = CHAT,
    **more: Any,
) -> httpx.Response:
    """Ask for 20 likeliest tokens behind messages or a prompt, in a session or in none."""
    headers = {} if session is None else {"x-session-id": session}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    body = {"max_tokens": 20, "temperature": 0, **more}
    body["messages" if path == CHAT else "prompt"] = messages
    return httpx.post(url + path, json=body, headers=headers, timeout=60)


def content(response: httpx.Response) -> str:
    """Return the text of an answer."""
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


def cached(response: httpx.Response) -> int:
    """Return how many tokens were not read again."""
    found: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert response.headers["x-cached-tokens"] == str(found)
    return found


def offline_answer(lm: LanguageModel, messages: list[dict[str, str]], count: int) -> str:
    """Return what a model answers by itself, greedily."""
    ids = lm.codec.ids(ChatTemplate.of(lm.bundle).render(messages))
    return "".join(lm.codec.stream(lm.generate(ids, max_new_tokens=count), after=ids))


def events(lines: Iterator[str]) -> Iterator[Any]:
    """Yield the events of a stream, "[DONE]" as it is; every event must be whole."""
    for line in lines:
        if not line or line.startswith(":"):
            continue
        assert line.startswith("data: "), line
        data = line.removeprefix("data: ")
        yield data if data == "[DONE]" else json.loads(data)


def post(url: str, path: str, **body: Any) -> httpx.Response:
    """Send a request with a JSON body."""
    return httpx.post(f"{url}{path}", json=body, timeout=60)


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never held"
        time.sleep(0.01)
