"""Who races in `race.py`: servers under one load generator, and onnxruntime-genai in a process."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from benchmarks.peers.gguf_race import write_float32
from benchmarks.serving import servers
from benchmarks.serving.clients import Answer, Target, load, random_prompts, summary
from lminf_export.bundle.folder import Bundle

WORKER = Path(__file__).with_name("genai_worker.py")
BUILD = Path(__file__).with_name("genai_build.py")
ROOM = 64  # tokens of a slot behind what is measured
# Tokens of a slot at least: onnxruntime-genai's caches must hold a layer's sliding window.
LEAST = 1024


class Refused(Exception):
    """A contestant does not race; says why."""


class Contestant(Protocol):
    """A contestant; asleep unless it is awake."""

    def awake(self) -> Any:
        """Return a context in which it runs."""

    def load(self, clients: int, prompt_tokens: int, new_tokens: int, seed: int) -> dict[str, Any]:
        """Answer as many prompts at once; return `clients.summary`."""

    def follow(self, history: int, more: int, seed: int, name: str) -> dict[str, float]:
        """Return milliseconds to the first token of a follow-up: `kept` and `stateless`.

        Args:
            history: tokens before it.
            more: tokens of it.
            seed: of the prompts.
            name: of the conversation.
        """


class ServerContestant:
    """A server, and how its conversations are kept.

    Args:
        server: that runs.
        vocab_size: of its model.
        first_id: token that begins a prompt.
        has_sessions: a follow-up sends only what is new, with the header x-session-id.
    """

    def __init__(
        self, server: servers.Server, vocab_size: int, first_id: int | None, has_sessions: bool
    ) -> None:
        self.server, self.has_sessions = server, has_sessions
        self.vocab_size, self.first_id = vocab_size, first_id
        server.sleep()

    @contextmanager
    def awake(self) -> Iterator[None]:
        self.server.wake()
        try:
            yield
        finally:
            self.server.sleep()

    def load(self, clients: int, prompt_tokens: int, new_tokens: int, seed: int) -> dict[str, Any]:
        async def run() -> list[Answer]:
            async with Target(self.server.url, self.server.kind) as target:
                return await load(target, self._prompts(clients, prompt_tokens, seed), new_tokens)

        answers = asyncio.run(run())
        for answer in answers:
            if answer.error is None and answer.prompt_tokens != prompt_tokens:
                answer.error = f"a prompt of {answer.prompt_tokens} tokens"
        return summary(answers)

    def _prompts(self, count: int, tokens: int, seed: int) -> list[list[int]]:
        return random_prompts(count, tokens, self.vocab_size, seed, self.first_id)

    def follow(self, history: int, more: int, seed: int, name: str) -> dict[str, float]:
        async def run() -> dict[str, float]:
            async with Target(self.server.url, self.server.kind) as target:
                known, unknown = self._prompts(2, history, seed)
                new = random_prompts(1, more, self.vocab_size, seed + 1)[0]
                headers = {"x-session-id": name} if self.has_sessions else {}
                begun = await target.complete(known, 1, headers=headers)
                sent = new if self.has_sessions else known + new
                kept = await target.complete(sent, 1, headers=headers)
                stateless = await target.complete(unknown + new, 1)
                for answer in (begun, kept, stateless):
                    if answer.error is not None:
                        raise SystemExit(f"{self.server.name}: {answer.error}")
                return {"kept": kept.first * 1e3, "stateless": stateless.first * 1e3}

        return asyncio.run(run())


class GenaiContestant:
    """onnxruntime-genai, asked by Python.

    Args:
        python: that has it.
        folder: its model.
        threads: of its operators.
        way: "batch" or "engine", see `genai_worker.py`.
        slots: most prompts at once.
        longest: tokens of a sequence.
    """

    def __init__(
        self, python: str, folder: Path, threads: int, way: str, slots: int, longest: int
    ) -> None:
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.vocab_size, self.first_id = config["vocab_size"], config.get("bos_token_id")
        self.way = way
        self.process = subprocess.Popen(
            [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._ask("load", folder=str(folder), threads=threads, slots=slots, longest=longest)
        self.process.send_signal(signal.SIGSTOP)

    def _ask(self, do: str, **what: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Refused(f"onnxruntime-genai ended with {self.process.wait()}")
        found = json.loads(line)
        if "refused" in found:
            raise Refused(found["refused"])
        return found

    @contextmanager
    def awake(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def load(self, clients: int, prompt_tokens: int, new_tokens: int, seed: int) -> dict[str, Any]:
        prompts = random_prompts(clients, prompt_tokens, self.vocab_size, seed, self.first_id)
        found = self._ask(self.way, prompts=prompts, new=new_tokens)["arrivals"]
        answers = [
            Answer(0.0, arrivals, arrivals[-1], prompt_tokens, len(arrivals)) for arrivals in found
        ]
        return summary(answers)

    def follow(self, history: int, more: int, seed: int, name: str) -> dict[str, float]:
        prompt = random_prompts(1, history, self.vocab_size, seed, self.first_id)[0]
        new = random_prompts(1, more, self.vocab_size, seed + 1)[0]
        found = self._ask("follow", history=prompt, more=new)
        return {way: seconds * 1e3 for way, seconds in found.items()}

    def stop(self) -> None:
        self.process.kill()  # it may be asleep
        self.process.wait()


def prepare(arguments: argparse.Namespace) -> None:
    """Link and write what was given into the folder of work; what is there already is kept."""
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    for name, given in (
        ("ours-fp32", arguments.fp32),
        ("ours-int4", arguments.int4),
        ("llama-q4_k_m.gguf", arguments.gguf),
    ):
        if given is not None:
            (work / name).unlink(missing_ok=True)
            (work / name).symlink_to(given.resolve())
    whole = work / "llama-f32.gguf"
    if arguments.gguf is not None and not whole.exists():
        partial = work / "partial.gguf"
        write_float32(arguments.gguf, partial)
        partial.rename(whole)
    if arguments.genai_python is not None and arguments.checkpoint is not None:
        for precision in ("fp32", "int4"):
            to = work / f"genai-{precision}"
            command = [arguments.genai_python, str(BUILD), "--model", str(arguments.checkpoint)]
            command += ["--out", str(to), "--precision", precision]
            if not to.exists():
                told = subprocess.run(command, capture_output=True, text=True, check=False)
                if told.returncode:
                    raise SystemExit(f"onnxruntime-genai's builder: {told.stderr[-1000:]}")


def entered(stack: ExitStack, name: str, arguments: argparse.Namespace, threads: int) -> Contestant:
    """Start a contestant, which ends with the stack.

    Raises:
        Refused: something of it is missing, or it cannot run the model.
    """
    work, slots = arguments.work, arguments.clients
    needed = arguments.prompt_tokens + arguments.new_tokens + arguments.more_tokens
    longest = max(LEAST, needed + ROOM)
    kind, precision, *way = name.replace(",", "").split()
    if kind == "genai":
        folder = work / f"genai-{precision}"
        if arguments.genai_python is None or not folder.exists():
            raise Refused("not prepared")
        genai = GenaiContestant(
            arguments.genai_python, folder, threads,
            "engine" if way == ["Engine"] else "batch", slots, longest,
        )  # fmt: skip
        stack.callback(genai.stop)
        return genai
    bundle = work / "ours-fp32" if precision in ("fp32", "f32") else work / "ours-int4"
    if not bundle.exists():
        raise Refused("not prepared")
    vocab_size = Bundle.open(bundle).manifest.vocab_size
    if kind == "ours":
        server = servers.ours(name, bundle, threads, slots)
    else:
        model = work / f"llama-{precision}.gguf"
        if arguments.llama_server is None or not model.exists():
            raise Refused("not prepared")
        server = servers.llama(name, arguments.llama_server, model, threads, slots, longest)
    stack.enter_context(server)
    return ServerContestant(server, vocab_size, arguments.first_id, kind == "ours")
