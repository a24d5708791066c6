"""Tokens a second of 1, 2, 4, 8 and 16 streams that are decoded together, taking turns.

Beside each batch stand the two things no kernel can beat: the time in which memory yields a step's
bytes, and the time in which the vector units multiply its products; and where a step's time goes
by onnxruntime's profiler: products with weights, which the streams of a batch share, attention over
the caches, of which each stream has its own, and the rest. Weights are random, of a
Llama's shape; they, and the bundles, are made in --work where they are missing. Each part of the
result is written as it is found, and a run goes on with the parts that are missing; --again
measures all of them anew.

    python -m benchmarks.decoding.batch_decoding --work W \\
        --out benchmarks/results/batch_decoding.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.peers.prepare import path_of, prepare
from benchmarks.support.arithmetic import products_per_second
from benchmarks.support.checkpoints import SHAPES
from benchmarks.support.result import write_result
from lminf_export.bench.floor import (
    cache_bytes_per_step,
    streaming_bandwidth,
    weight_bytes_per_step,
)
from lminf_export.bench.graph import read_graph
from lminf_export.bench.profile import summarize
from lminf_export.bundle.folder import Bundle
from lminf_export.runtime.environment import environment
from lminf_export.runtime.kernels import AUTO
from lminf_export.runtime.onnxruntime import OnnxRuntimeSession
from lminf_export.runtime.profiling import record_profile
from lminf_export.runtime.session import Session

BATCHES = (1, 2, 4, 8, 16)
STEPS, WARM = 6, 1  # of a turn
PRODUCTS = ("Linear", "LinearAdd", "LinearNBits", "LinearNBitsAdd")


class Batch:
    """Some streams of one session, as if each had read `position` random tokens."""

    def __init__(self, session: Session, streams: int, position: int) -> None:
        self._session, self._state = session, session.new_state(streams)
        session.stand_at(self._state, position)
        session.fill(self._state, np.random.default_rng(0))
        self._token, self._index = np.ones((streams, 1), np.int64), np.zeros((streams, 1), np.int64)
        self._one = np.ones(streams, np.int64)

    def turn(self, steps: int) -> list[float]:
        """Return the milliseconds of each of some steps."""
        times = []
        for _ in range(WARM + steps):
            start = time.perf_counter()
            self._session.step(self._state, self._token, self._one, self._index)
            times.append((time.perf_counter() - start) * 1e3)
        return times[WARM:]


def products_per_token(bundle: Bundle) -> dict[str, int]:
    """Multiplications with weights a token costs, by the type they are multiplied in."""
    found = {"float32": 0, "int8": 0}
    for node in read_graph(bundle):
        if node.op_type not in PRODUCTS:
            continue
        if "NBits" in node.op_type:
            level = node.attributes["accuracy_level"].as_int()
            size = node.attributes["K"].as_int() * node.attributes["N"].as_int()
            found["int8" if level == 4 else "float32"] += size
        else:
            weight = node.inputs[1]
            assert isinstance(weight, ir.Value)
            assert weight.shape is not None
            found["float32"] += int(np.prod(weight.shape.numpy()))
    return found


def measure(
    bundle: Bundle, libraries: dict[str, str], threads: int, position: int, rounds: int
) -> dict[str, Any]:
    """Every batch at one number of threads, in turns."""
    sessions = {
        name: OnnxRuntimeSession(bundle, threads=threads, kernels=kernels)
        for name, kernels in libraries.items()
    }
    batches = {
        (name, streams): Batch(session, streams, position)
        for name, session in sessions.items()
        for streams in BATCHES
    }
    times: dict[tuple[str, int], list[float]] = {key: [] for key in batches}
    bandwidth, products = 0.0, dict[str, float]()
    for turn in range(rounds):
        bandwidth = max(bandwidth, streaming_bandwidth(threads))
        for kind, rate in products_per_second(threads).items():
            products[kind] = max(products.get(kind, 0.0), rate)
        for key in list(batches)[:: 1 if turn % 2 else -1]:
            times[key] += batches[key].turn(STEPS)
    per_token = products_per_token(bundle)
    profiles = {streams: profile(bundle, streams, position, threads) for streams in BATCHES}
    rows = []
    for streams in BATCHES:
        read = weight_bytes_per_step(bundle, streams)
        read += streams * cache_bytes_per_step(bundle, position)
        row: dict[str, Any] = {
            "streams": streams,
            "bytes_ms": round(read / bandwidth * 1e3, 3),
            "arithmetic_ms": arithmetic_ms(per_token, products, streams),
            "profile_ms": profiles[streams],
        }
        for name in libraries:
            ms, alone = (statistics.median(times[name, count]) for count in (streams, 1))
            row[name] = {
                "ms_per_step": round(ms, 3),
                "best": round(min(times[name, streams]), 3),
                "tokens_per_second": round(streams / ms * 1e3, 1),
                "times_one_stream": round(streams * alone / ms, 3),
            }
        print(row, file=sys.stderr)
        rows.append(row)
    return {
        "rounds": rounds,
        "steps_a_round": STEPS,
        "bandwidth_bytes_per_second": round(bandwidth),
        "peak_products_per_second": {kind: round(rate) for kind, rate in products.items()},
        "products_per_token": per_token,
        "rows": rows,
    }


def profile(bundle: Bundle, streams: int, position: int, threads: int) -> dict[str, float]:
    """Milliseconds of a step's operators under onnxruntime's profiler, which costs time itself."""
    steps = 4 * STEPS

    def decode(session: Session) -> None:
        Batch(session, streams, position).turn(steps)

    found = {"products": 0.0, "attention": 0.0, "rest": 0.0}
    for kind in summarize(record_profile(bundle, decode, threads=threads), steps):
        is_attention = "Attention" in kind.kind
        part = "products" if kind.kind in PRODUCTS else "attention" if is_attention else "rest"
        found[part] += kind.ms_per_step
    return {part: round(ms, 3) for part, ms in found.items()}


def arithmetic_ms(per_token: dict[str, int], peak: dict[str, float], streams: int) -> float | None:
    """The least milliseconds of a step's products with weights; None where a peak is unknown."""
    if any(count and kind not in peak for kind, count in per_token.items()):
        return None
    seconds = sum(count / peak[kind] for kind, count in per_token.items() if count)
    return round(seconds * streams * 1e3, 3)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of weights and bundles")
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--position", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--before", help="another kernel library, to compare with")
    parser.add_argument("--again", action="store_true", help="measure parts that are there, too")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options.shape, options.work, [("ours", name) for name in options.precisions])
    libraries = {"kernel": AUTO} | ({"before": options.before} if options.before else {})
    header = {
        "shape": options.shape,
        "position": options.position,
        **environment(),
    }
    parts: dict[str, Any] = {}
    if options.out.is_file() and not options.again:
        kept = json.loads(options.out.read_text(encoding="utf-8"))
        if all(kept.get(key) == header[key] for key in ("shape", "position", "device")):
            parts = kept["parts"]
    for precision in options.precisions:
        bundle = Bundle.open(path_of(options.work, "ours", precision))
        for threads in options.threads:
            name = f"{precision}, {threads} thread" + ("s" if threads > 1 else "")
            if name in parts:
                continue
            print(name, file=sys.stderr)
            parts[name] = measure(bundle, libraries, threads, options.position, options.rounds)
            write_result(options.out, {**header, "parts": parts})


if __name__ == "__main__":
    main()
