"""The gain of reading the weights of projections in place, in one run, taking turns.

The same bundle in three forms: the graph's function bodies alone, the CPU library's attention
with projections put back to onnxruntime's Gemm or MatMulNBits, and the whole library. Decoding
positions are set, not read: rings hold random numbers. Memory is that of fresh processes. With
--cold the weights' file is dropped from the page cache first and read again by the library, as
after starting the machine: what reads a file first decides how large its pages are.

    python -m benchmarks.kernels.projections --bundle B --cold \\
        --out benchmarks/results/projections.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.support.result import write_result
from benchmarks.support.stream import Stream
from lminf_export.bench.floor import (
    cache_bytes_per_step,
    streaming_bandwidth,
    weight_bytes_per_step,
)
from lminf_export.bundle.folder import Bundle
from lminf_export.operator.contract import DOMAIN
from lminf_export.operator.linear_bodies import (
    CONTRIB_DOMAIN,
    LINEAR,
    LINEAR_ADD,
    LINEAR_NBITS,
    LINEAR_NBITS_ADD,
)
from lminf_export.runtime.environment import environment
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.onnxruntime import OnnxRuntimeSession

FORMS = {"function_body": "none", "attention_only": "auto", "kernel": "auto"}
STEPS = 6  # tokens decoded in one go before the next contestant's turn


def projections_as_onnxruntimes(bundle: Bundle) -> bytes:
    """The bundle's graph with Gemm and MatMulNBits in place of the operators of lminf."""
    model = onnx.load(bundle.graph_path, load_external_data=False)
    nodes = [new for node in model.graph.node for new in _as_onnxruntimes(node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def _as_onnxruntimes(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    if node.domain == DOMAIN and node.op_type in (LINEAR, LINEAR_ADD):
        node.op_type, node.domain = "Gemm", ""
        node.attribute.append(onnx.helper.make_attribute("transB", 1))
    elif node.domain == DOMAIN and node.op_type in (LINEAR_NBITS, LINEAR_NBITS_ADD):
        addend = node.input.pop(3) if node.op_type == LINEAR_NBITS_ADD else None
        node.op_type, node.domain = "MatMulNBits", CONTRIB_DOMAIN
        if addend is not None:
            result, node.output[0] = node.output[0], f"{node.output[0]}.product"
            return [node, onnx.helper.make_node("Add", [node.output[0], addend], [result])]
    return [node]


def open_form(path: str, form: str, threads: int, **settings: Any) -> OnnxRuntimeSession:
    bundle = Bundle.open(path)
    graph = projections_as_onnxruntimes(bundle) if form == "attention_only" else None
    kernels = FORMS[form]
    return OnnxRuntimeSession(bundle, threads=threads, kernels=kernels, graph=graph, **settings)


def stream(path: str, form: str, threads: int) -> Stream:
    """Load one form of the bundle."""
    return Stream(LanguageModel(Bundle.open(path), open_form(path, form, threads)))


def nodes_of_a_step(path: str, form: str) -> dict[str, int]:
    """How often each kind of operator runs in one decoding step."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_form(path, form, 1, profile=Path(folder) / "p")
        one, zero = np.ones(1, np.int64), np.zeros((1, 1), np.int64)
        session.step(session.new_state(1), zero, one, zero)
        events = json.loads(session.end_profiling().read_text())
    names = [e["args"]["op_name"] for e in events if e.get("name", "").endswith("kernel_time")]
    return dict(Counter(names).most_common())


def memory_of(path: str, form: str, position: int) -> dict[str, float]:
    """Of a fresh process: memory at a position, seconds from loading to a first token."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.kernels.projections",
        "--bundle",
        path,
        "--memory-of",
        form,
    ]
    done = subprocess.run(
        [*command, "--positions", str(position)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def read_again(bundle: Bundle) -> None:
    """Drop the weights from the page cache, and let the library be the first to read them."""
    for name in bundle.manifest.files_of("weights"):
        with open(bundle.path / name, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    memory_of(str(bundle.path), "kernel", 1)


def measure_memory(path: str, form: str, position: int) -> dict[str, float]:
    before, start = anonymous_bytes(), time.perf_counter()
    ours = stream(path, form, threads=1)
    ours.model.forward(ours.token, ours.model.new_state(), logits="last")
    seconds = time.perf_counter() - start
    ours.stand_at(position)
    ours.decode(3)
    return {
        "anonymous_over_imports_bytes": anonymous_bytes() - before,
        "file_huge_pages_bytes": file_huge_pages(),
        "load_to_first_token_seconds": round(seconds, 3),
    }


def anonymous_bytes() -> int:
    """This process's memory that no file backs."""
    status = Path("/proc/self/status").read_text().splitlines()
    kinds = ("RssAnon", "RssShmem")
    return sum(int(line.split()[1]) * 1024 for line in status if line.startswith(kinds))


def file_huge_pages() -> int:
    """Bytes of mapped files that this process sees through huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("FilePmdMapped"))


def compare(
    contestants: dict[str, Stream], position: int, rounds: int, bytes_read: int, threads: int
) -> dict[str, Any]:
    """Milliseconds a token at one position, taking turns, and ratios of each round."""
    for one in contestants.values():
        one.stand_at(position)
        one.decode(2)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    bandwidth = 0.0
    for _ in range(rounds):
        bandwidth = max(bandwidth, streaming_bandwidth(threads))
        for name, one in contestants.items():
            times[name].append(one.decode(STEPS) * 1e3)
    floor = bytes_read / bandwidth * 1e3
    row: dict[str, Any] = {
        "position": position,
        "rounds": rounds,
        "bandwidth_bytes_per_second": round(bandwidth),
        "floor_ms": round(floor, 3),
    }
    for name, found in times.items():
        row[name] = {
            "ms_per_token": round(statistics.median(found), 3),
            "best": round(min(found), 3),
            "times_the_floor": round(statistics.median(found) / floor, 3),
            "times_the_kernels": round(
                statistics.median(a / b for a, b in zip(found, times["kernel"], strict=True)), 3
            ),
        }
    print(row, file=sys.stderr)
    return row


def prefill_speeds(contestants: dict[str, Stream], count: int) -> dict[str, float]:
    """Tokens a second of reading a prompt, taking turns."""
    turns = [{name: one.prefill(count) for name, one in contestants.items()} for _ in range(3)]
    return {name: round(statistics.median(t[name] for t in turns), 1) for name in contestants}


def _quantization(bundle: Bundle) -> dict[str, Any] | None:
    record = bundle.manifest.quantization
    return None if record is None else record.model_dump()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--positions", type=int, nargs="+", default=[512, 2048, 4096, 1_000_000])
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="read the weights from disk first")
    parser.add_argument("--memory-of", choices=FORMS, help="of this process at one position")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    path, threads = arguments.bundle, arguments.threads
    if arguments.memory_of:
        print(json.dumps(measure_memory(path, arguments.memory_of, arguments.positions[0])))
        return
    bundle = Bundle.open(path)
    window = bundle.manifest.lambda_config.window_size
    if arguments.cold:
        read_again(bundle)
    memory = {form: memory_of(path, form, window) for form in FORMS}
    contestants = {form: stream(path, form, threads) for form in FORMS}
    prefill = prefill_speeds(contestants, arguments.prefill)
    rows = []
    for position in arguments.positions:
        needed = weight_bytes_per_step(bundle, 1) + cache_bytes_per_step(bundle, position)
        rows.append(compare(contestants, position, arguments.rounds, needed, threads))
    result = {
        "benchmark": "projections",
        "model": bundle.manifest.source.name,
        "parameters_bytes": sum(
            bundle.manifest.files[name].bytes for name in bundle.manifest.files_of("weights")
        ),
        "lambda_config": bundle.manifest.lambda_config.model_dump(),
        "dtype": bundle.manifest.dtype,
        "quantization": _quantization(bundle),
        "threads": threads,
        "weights_read_anew": arguments.cold,
        "attention": {n: one.model.session.attention for n, one in contestants.items()},
        "prefill_tokens": arguments.prefill,
        "prefill_tokens_per_second": prefill,
        "decode": rows,
        "memory": memory,
        "nodes_of_a_step": {form: nodes_of_a_step(path, form) for form in FORMS},
        **environment(),
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
