"""The contestants of `race.py`, and the process of each."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.peers.prepare import path_of
from benchmarks.peers.worker import READ_LIMIT

CONTESTANTS = {
    "transformers fp32": ("transformers", "fp32"),
    "onnxruntime-genai fp32": ("genai", "fp32"),
    "onnxruntime-genai fp32, its graph": ("genai-graph", "fp32"),
    "llama.cpp f32": ("llama.cpp", "f32"),
    "ours fp32": ("ours", "fp32"),
    "ours fp32, no kernel": ("ours-body", "fp32"),
    "onnxruntime-genai int4": ("genai", "int4"),
    "onnxruntime-genai int4, its graph": ("genai-graph", "int4"),
    "llama.cpp q4_0": ("llama.cpp", "q4_0"),
    "ours int8": ("ours", "int8"),
    "ours int4": ("ours", "int4"),
    "ours int4, no kernel": ("ours-body", "int4"),
}
# Only of a real model, from its GGUF: benchmarks/real/speed.py.
REAL_CONTESTANTS = {
    "llama.cpp q4_k_m": ("llama.cpp", "q4_k_m"),
    "llama.cpp q4_k_m, context shift": ("llama.cpp-shift", "q4_k_m"),
    "ours fp32, int8 ring": ("ours", "fp32-int8-ring"),
}
# Only of graphs of onnxruntime-genai: benchmarks/rewriting/race.py.
REWRITTEN = {"rewritten int4": ("rewritten", "int4")}
PACKAGES = {
    "transformers": "transformers",
    "genai": "onnxruntime_genai",
    "genai-graph": "onnxruntime_genai",
    "llama.cpp": "llama_cpp",
    "llama.cpp-shift": "llama_cpp",
}
# Where llama-cpp-python is in an environment of its own: that environment's Python.
LLAMA_PYTHON = "LMINF_LLAMA_PYTHON"
OURS = ("ours", "ours-body")
LONGEST = 32768 + 128
ROOM = 256  # behind a context that is read


class Child:
    """A contestant's process, stopped unless it is asked something."""

    worker = "benchmarks.peers.worker"

    def __init__(
        self, name: str, work: Path, threads: int, longest: int, read_limit: int = READ_LIMIT
    ) -> None:
        kind, precision = kind_of(name)
        numbers = [str(threads), str(longest), str(read_limit)]
        limits = {key: str(threads) for key in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        self.name, self.longest, self.begun = name, longest, time.perf_counter()
        self.process = subprocess.Popen(
            [
                python_of(kind),
                "-m",
                self.worker,
                kind,
                precision,
                str(work),
                *numbers,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **limits},
        )
        self.imports_bytes = self._answer()["anonymous_bytes"]
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        self.process.send_signal(signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")
        self.process.stdin.flush()
        found = self._answer()
        self.process.send_signal(signal.SIGSTOP)
        return found

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # it has nothing to put away, and is stopped
        self.process.wait()


def kind_of(name: str) -> tuple[str, str]:
    """Return a contestant's kind and precision."""
    return {**CONTESTANTS, **REAL_CONTESTANTS, **REWRITTEN}[name]


def python_of(kind: str) -> str:
    """Return the Python that has a kind's package."""
    other = os.environ.get(LLAMA_PYTHON) if kind.startswith("llama.cpp") else None
    return other or sys.executable


def missing(name: str, work: Path) -> str | None:
    kind, precision = kind_of(name)
    package, python = PACKAGES.get(kind), python_of(kind)
    if package is not None and python == sys.executable and not find_spec(package):
        return "not installed"
    if package is not None and python != sys.executable:
        tried = subprocess.run(
            [python, "-c", f"import {package}"], capture_output=True, check=False
        )
        if tried.returncode:
            return "not installed"
    return None if path_of(work, kind, precision).exists() else "not prepared"


def longest_of(name: str, arguments: argparse.Namespace) -> int:
    """Caches that are allocated up front get what this run needs of them."""
    return LONGEST if kind_of(name)[0] == "genai-graph" else arguments.read_limit + ROOM


def stand(child: Child, context: int) -> dict[str, Any]:
    kind = kind_of(child.name)[0]
    if kind == "transformers" and context > max(LONGEST, child.longest):
        return {"refused": "its cache would not fit"}
    if kind == "genai-graph" and context > LONGEST:
        return {"refused": "its context ends"}
    return child.ask("stand", context=context)
