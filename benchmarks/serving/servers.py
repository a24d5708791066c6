"""Servers as processes: started, waited for, stopped while others are timed, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

START_SECONDS = 120.0
END_SECONDS = 20.0


class ServerError(Exception):
    """A server does not run; with the end of its log."""


class Server:
    """A server's process; asleep (SIGSTOP) unless it is woken.

    Args:
        name: for messages.
        command: that starts it; `{port}` stands for its port.
        threads: for the environment variables that libraries read.
        kind: of `clients.Target`.

    Raises:
        ServerError: it ended, or did not answer in time.
    """

    def __init__(self, name: str, command: list[str], threads: int, kind: str) -> None:
        self.name, self.kind, self.port = name, kind, free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        limits = {key: str(threads) for key in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in stop
        self.process = subprocess.Popen(
            [part.replace("{port}", str(self.port)) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **limits},
        )
        self._wait_ready()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"{self.name} ended with {self.process.returncode}: {self.log()}")
            try:
                if httpx.get(f"{self.url}/models", trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        said = self.log()
        self.stop()
        raise ServerError(f"{self.name} did not answer in {START_SECONDS:.0f} s: {said}")

    def log(self) -> str:
        """The end of what it wrote."""
        self._log.seek(0)
        return self._log.read()[-2000:]

    def sleep(self) -> None:
        """Stop its threads until `wake`."""
        self.process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    @property
    def rss(self) -> int:
        """Resident memory, bytes."""
        return psutil.Process(self.process.pid).memory_info().rss

    def stop(self) -> None:
        """End the process."""
        self.wake()
        end(self.process)
        self._log.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def end(process: subprocess.Popen[Any], seconds: float = END_SECONDS) -> None:
    """End a process, by force if it takes longer."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def ours(name: str, bundle: Path, threads: int, slots: int, *more: str) -> Server:
    """`lminf serve` of a bundle."""
    command = [
        *(sys.executable, "-m", "lminf_export.cli.main", "serve", str(bundle)),
        *("--port", "{port}", "--threads", str(threads), "--slots", str(slots), *more),
    ]
    return Server(name, command, threads, "lminf")


def llama(name: str, binary: Path, model: Path, threads: int, slots: int, context: int) -> Server:
    """llama-server of a GGUF file, with a context of so many tokens for each slot.

    Args:
        name: for messages.
        binary: llama-server.
        model: the file.
        threads: for decoding and for prompts.
        slots: with continuous batching.
        context: tokens of each slot.
    """
    command = [
        *(str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", "{port}"),
        *("-np", str(slots), "-cb", "-c", str(slots * context)),
        *("-t", str(threads), "-tb", str(threads), "-fa", "on", "--offline"),
    ]
    return Server(name, command, threads, "llama-server")


def version_of(binary: Path | None) -> str:
    """Return llama-server's version and compiler, in its own words."""
    if binary is None:
        return "not given"
    told = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=False)
    lines: list[Any] = (told.stdout + told.stderr).splitlines()
    return "; ".join(line.strip() for line in lines if line.startswith(("version", "built")))
