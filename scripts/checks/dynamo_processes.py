"""An environment with Dynamo, and its frontend and our worker as processes on this machine."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil

from scripts.checks.overlays import ROOT, make_overlay

WORKER = ROOT / "examples" / "dynamo" / "worker.py"
# Dynamo, and what its frontend imports of the packages that it names.
REQUIREMENTS = [
    "ai-dynamo==1.6.1",
    "ai-dynamo-runtime==1.6.1",
    "msgspec==0.22.0",
    "uvloop==0.23.0",
]
HERE = "127.0.0.1"
# How long a worker that is told to end still takes requests; Dynamo's default is 5.
GRACE_SECONDS = 1
_START_SECONDS = 60.0


@dataclass
class Dynamo:
    """A frontend and its workers that run.

    Attributes:
        url: of the frontend.
        metrics: addresses of the workers' metrics.
        model: the name that requests bear.
        frontend, workers: the processes.
    """

    url: str
    metrics: list[str]
    model: str
    frontend: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]]

    def client(self) -> openai.OpenAI:
        """Return OpenAI's client of the frontend."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def counts(self, name: str) -> list[int]:
        """Return each worker's value of a metric."""
        texts = [httpx.get(address).text for address in self.metrics]
        found = [re.search(rf"^{name}(?:{{.*}})? (\d+)", text, re.MULTILINE) for text in texts]
        assert all(found), f"no {name} at {self.metrics}"
        return [int(one[1]) for one in found if one]

    def busy(self) -> int:
        """Return how many slots are taken."""
        return sum(self.counts("lminf_slots_busy"))

    def wait_for_busy(self, count: int, seconds: float) -> None:
        """Wait until so many slots are taken.

        Raises:
            TimeoutError: they are not after these seconds.
        """
        end = time.monotonic() + seconds
        while (busy := self.busy()) != count:
            if time.monotonic() > end:
                raise TimeoutError(f"{busy} slots are taken after {seconds} s, not {count}")
            time.sleep(0.02)

    def addresses(self) -> list[tuple[str, int]]:
        """Return where the processes listen."""
        return [
            (connection.laddr.ip, connection.laddr.port)
            for process in (self.frontend, *self.workers)
            for connection in psutil.Process(process.pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]


def make_dynamo(folder: Path) -> tuple[Path, dict[str, str]]:
    """Make or reuse an environment; return its Python, and what is in it besides our own."""
    # All that Dynamo names would bring clients of Kubernetes and Redis, and an older pydantic.
    python = make_overlay(folder, ["--no-deps", *REQUIREMENTS])
    return python, dict(requirement.split("==") for requirement in REQUIREMENTS)


@contextmanager
def dynamo_running(
    python: Path,
    bundle: Path,
    work: Path,
    *,
    worker_options: tuple[object, ...] = (),
    frontend_options: tuple[object, ...] = (),
    num_workers: int = 1,
) -> Iterator[Dynamo]:
    """Run a frontend and workers until the block ends; their logs stay in a folder.

    Args:
        python: of an environment with Dynamo.
        bundle: to serve.
        work: folder of the logs, and of the files through which they find each other.
        worker_options, frontend_options: of their command lines.
        num_workers: of the same bundle.

    Raises:
        TimeoutError: the frontend lists no model after a minute.
    """
    found_by = work / "discovery"
    shutil.rmtree(found_by, ignore_errors=True)
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DYN_FILE_KV": str(found_by),
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": str(GRACE_SECONDS),
    }
    http_port, *system_ports = (_free_port() for _ in range(1 + num_workers))
    front = [python, "-m", "dynamo.frontend", "--discovery-backend", "file", *frontend_options]
    front += ["--http-host", HERE, "--http-port", http_port]
    back = [python, WORKER, bundle, "--name", "demo", "--model-folders", work / "folders"]
    back += worker_options
    # A worker binds to 127.0.0.1 by itself; the frontend is told to.
    hosts = dict.fromkeys(
        ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST"), HERE
    )
    with ExitStack() as stack:
        frontend = stack.enter_context(
            _process(front, {**variables, **hosts}, work / "frontend.log")
        )
        workers = [
            stack.enter_context(
                _process(back, {**variables, "DYN_SYSTEM_PORT": port}, work / f"worker{i}.log")
            )
            for i, port in enumerate(system_ports)
        ]
        metrics = [f"http://{HERE}:{port}/metrics" for port in system_ports]
        dynamo = Dynamo(f"http://{HERE}:{http_port}", metrics, "demo", frontend, workers)
        _wait_for_model(dynamo, work)
        yield dynamo


@contextmanager
def _process(
    command: list[object], variables: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as written:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=log.parent,
            env=variables,
            stdout=written,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _wait_for_model(dynamo: Dynamo, work: Path) -> None:
    """Wait until the frontend lists the model and every worker is found."""
    processes = {"frontend": dynamo.frontend}
    processes |= {f"worker{i}": process for i, process in enumerate(dynamo.workers)}
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        for name, process in processes.items():
            if process.poll() is not None:
                tail = (work / f"{name}.log").read_text(errors="replace")[-500:]
                raise TimeoutError(f"the {name} ended with {process.returncode}: {tail}")
        registered = list((work / "discovery").glob("v1/instances/*"))
        if len(registered) == len(dynamo.workers) and _lists_a_model(dynamo):
            return
        time.sleep(0.2)
    raise TimeoutError(f"no model after {_START_SECONDS:.0f} s; see the logs in {work}")


def _lists_a_model(dynamo: Dynamo) -> bool:
    try:
        return bool(json.loads(httpx.get(f"{dynamo.url}/v1/models").text)["data"])
    except (httpx.TransportError, json.JSONDecodeError):
        return False


def _free_port() -> str:
    """Return a free port below 32,768: Dynamo holds that of its metrics in a signed short."""
    for port in random.sample(range(20_000, 2**15), 100):
        with socket.socket() as tried:
            if tried.connect_ex((HERE, port)):
                return str(port)
    raise TimeoutError("none of a hundred ports is free")
