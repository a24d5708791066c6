"""The paper's own efficiency experiment: encode 32k tokens, decode behind them, watch memory.

arXiv 2308.16137 measures Λ-attention against full attention on Llama-2-7B at a context of 32k, on
one GPU. Here: the same shape with random weights; full attention is transformers with sdpa and
its DynamicCache, Λ-attention a bundle in onnxruntime. Each contestant runs in a process of its
own, one after the other, on an otherwise idle device. Memory is the device's peak above what it
held before (nvidia-smi), or on a CPU the process's peak anonymous memory.

    python -m benchmarks.decoding.paper --work DIR --device cuda \\
        --out benchmarks/results/paper.json
    python -m benchmarks.decoding.paper --work DIR --device cpu --shape tiny \\
        --context 512 --window-size 64
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.support.checkpoints import SHAPES, write_checkpoint
from benchmarks.support.memory import anonymous_bytes
from benchmarks.support.result import write_result
from lminf_export.runtime.environment import environment

CONTESTANTS = ("full", "lambda")
WARM_UP = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, required=True, help="folder for weights and bundle")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--decode-tokens", type=int, default=100)
    parser.add_argument("--window-size", type=int, default=4096, help="the paper's")
    parser.add_argument("--num-sink-tokens", type=int, default=10, help="the paper's")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.contestant:
        print(json.dumps(run(arguments)))
        return
    write_result(arguments.out, measure(arguments))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the weights once, then run one contestant after the other."""
    if arguments.device == "cuda" and shutil.which("nvidia-smi") is None:
        raise SystemExit("--device cuda: there is no nvidia-smi here, so no GPU; use --device cpu")
    source, bundle = arguments.work / arguments.shape, arguments.work / "lambda"
    dtype = "float16" if arguments.device == "cuda" else "float32"
    if not source.is_dir():
        write_checkpoint(source, SHAPES[arguments.shape], getattr(torch, dtype), 2**20)
    import lminf_export

    lminf_export.export(
        source,
        bundle,
        dtype=dtype,
        weights="link",
        window_size=arguments.window_size,
        num_sink_tokens=arguments.num_sink_tokens,
        force=True,
    )
    rows = {name: run_child(name, arguments) for name in CONTESTANTS}
    full, ours = rows["full"], rows["lambda"]
    keys = ("encode_seconds", "decode_ms_per_token", "peak_memory_bytes")
    return {
        "benchmark": "paper",
        "shape": arguments.shape,
        "context": arguments.context,
        "window_size": arguments.window_size,
        "num_sink_tokens": arguments.num_sink_tokens,
        "dtype": dtype,
        "device_kind": arguments.device,
        "device_name": device_name(arguments.device),
        "contestants": rows,
        "full_over_lambda": {key: round(full[key] / ours[key], 3) for key in keys},
        **environment(),
    }


def run_child(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one contestant in a process and sample its memory from outside."""
    before = device_bytes() if arguments.device == "cuda" else 0
    peak = 0
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.decoding.paper", *sys.argv[1:], "--contestant", name],
        stdout=subprocess.PIPE,
        text=True,
    )
    while child.poll() is None:
        on_cuda = arguments.device == "cuda"
        peak = max(peak, device_bytes() - before if on_cuda else anonymous_bytes(child.pid))
        time.sleep(0.05)
    assert child.stdout is not None
    if child.returncode:
        raise SystemExit(f"{name} failed with {child.returncode}")
    found = json.loads(child.stdout.read().splitlines()[-1])
    return {**found, "peak_memory_bytes": peak}


def device_bytes() -> int:
    """Memory in use on the first GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return int(subprocess.run(query, check=True, capture_output=True, text=True).stdout) * 2**20


def device_name(kind: str) -> str:
    if kind == "cpu":
        return "cpu"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", "0"]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Encode the context, then decode behind it."""
    vocab_size = SHAPES[arguments.shape]["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocab_size, arguments.context)
    contestant = {"full": Full, "lambda": Lambda}[arguments.contestant](arguments)
    contestant.encode(tokens[:64])  # kernels are chosen and memory pools filled
    start = time.perf_counter()
    contestant.encode(tokens)
    encoded = time.perf_counter() - start
    times = []
    for _ in range(WARM_UP + arguments.decode_tokens):
        start = time.perf_counter()
        contestant.step()
        times.append(time.perf_counter() - start)
    return {
        "encode_seconds": round(encoded, 4),
        "decode_ms_per_token": round(statistics.median(times[WARM_UP:]) * 1e3, 4),
    }


class Full:
    """transformers, the unmodified model; its prompt goes in chunks so that activations fit."""

    chunk = 4096

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_grad_enabled(False)
        torch.set_num_threads(arguments.threads)
        self.device = torch.device(arguments.device)
        self.model = AutoModelForCausalLM.from_pretrained(
            arguments.work / arguments.shape, dtype="auto", attn_implementation="sdpa"
        )
        self.model = self.model.to(self.device).eval()

    def encode(self, tokens: Any) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache()
        for piece in torch.from_numpy(tokens)[None].split(self.chunk, dim=1):
            self._run(piece)

    def step(self) -> None:
        self._run(torch.tensor([[7]]))

    def _run(self, ids: Any) -> None:
        found = self.model(
            ids.to(self.device), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        found.logits.cpu()  # waits for the device


class Lambda:
    """A bundle in onnxruntime."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import lminf_export

        self.model = lminf_export.load(
            arguments.work / "lambda",
            provider=arguments.device,
            threads=arguments.threads if arguments.device == "cpu" else None,
        )

    def encode(self, tokens: Any) -> None:
        self.state = self.model.new_state()
        self.model.forward(tokens[None], self.state, logits="last")

    def step(self) -> None:
        self.model.forward([[7]], self.state, logits="last")


if __name__ == "__main__":
    main()
