"""Side by side: transformers, onnxruntime-genai, llama.cpp and this project on the same weights.

Every contestant is a process of its own (`worker.py`) with the same number of threads; all but the
one being timed are stopped (SIGSTOP). Contestants take turns, a few tokens each, so all are exposed
to the same load, and ratios are of turns that follow each other. Peers come with
`pip install '.[peers]'` (llama-cpp-python is built from source). Two steps:

    python -m benchmarks.peers.race prepare --shape 100m --work DIR
    python -m benchmarks.peers.race run --shape 100m --work DIR \\
        --sections decode-fp32 decode-int4 --out benchmarks/results/peers-100m.json

A result file is read first and only the sections asked for are replaced, so a run can be cut into
pieces. A peer that is not installed or cannot reach a context is in the file with the reason.
Contexts are read by peers up to 4096 tokens; where their cache can be set it is, and the file says
which. Beyond 4096 onnxruntime-genai's own graph is run in onnxruntime with its cache set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.peers.contestants import (
    CONTESTANTS,
    OURS,
    Child,
    kind_of,
    longest_of,
    missing,
    python_of,
    stand,
)
from benchmarks.peers.prepare import SINKS, WINDOW, prepare
from benchmarks.support.checkpoints import SHAPES
from benchmarks.support.result import write_result
from lminf_export.bench.floor import (
    cache_bytes_per_step,
    streaming_bandwidth,
    weight_bytes_per_step,
)
from lminf_export.bundle.folder import Bundle
from lminf_export.runtime.environment import environment

GROUPS = {
    "fp32": [name for name in CONTESTANTS if "32" in name],
    "int4": [name for name in CONTESTANTS if "32" not in name],
}
CONTEXTS = (512, 2048, 4096, 8192, 32768, 1_000_000)
PREFILL = 2048
LINEAR = ("ours fp32",)
LINEAR_TOKENS = 65536
TWINS = (4096, 1_000_000)


def decode(names: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a token at every context, contestants in turns.

    Where not all fit into memory at once they run in heats, ours in each of them; a cell of a
    later heat has ours's turns beside its own.
    """
    names = [name for name in names if name in arguments.contestants]
    ours = [name for name in names if kind_of(name)[0] in OURS]
    peers = [name for name in names if name not in ours]
    size = arguments.peers_at_once or len(peers) or 1
    heats = [peers[i : i + size] for i in range(0, len(peers), size)] or [[]]
    rows: dict[str, dict[str, Any]] = {}
    attention: dict[str, str] = {}
    bandwidth: dict[str, list[float]] = {}
    for number, some in enumerate(heats):
        found = heat([*some, *ours], arguments, attention, bandwidth)
        for name in some:
            for context, cell in found[name].items():
                if number and "turns_ms" in cell:
                    cell["against"] = {o: found[o][context].get("turns_ms") for o in ours}
        rows |= {name: row for name, row in found.items() if name not in rows}
    return {
        "rows": {name: rows[name] for name in names},
        "attention": attention,
        "turns_bandwidth_bytes_per_second": bandwidth,
        "heats": heats,
        "rounds": arguments.rounds,
        "tokens_a_turn": arguments.tokens,
    }


def heat(
    names: list[str],
    arguments: argparse.Namespace,
    attention: dict[str, str],
    bandwidth: dict[str, list[float]],
) -> dict[str, dict[str, Any]]:
    """Race these against each other; note what computes ours's attention.

    In each round memory is streamed, too: `bandwidth` gets, of the first heat, what it yielded.
    """
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    with ExitStack() as stack:
        children = {}
        for name in names:
            if reason := missing(name, arguments.work):
                rows[name] = {str(c): {"refused": reason} for c in arguments.contexts}
                continue
            child = _child(name, arguments, longest_of(name, arguments))
            children[name] = stack.enter_context(child)
            if text := child.ask("load").get("attention"):
                attention[name] = text
        for context in arguments.contexts:
            racing = {}
            for name, child in children.items():
                found = stand(child, context)
                if "refused" in found:
                    rows[name][str(context)] = found
                    continue
                child.ask("decode", tokens=2)
                racing[name] = found["how"]
            times: dict[str, list[list[float]]] = {name: [] for name in racing}
            streamed = []
            for _ in range(arguments.rounds):
                streamed.append(round(streaming_bandwidth(arguments.threads)))
                for name in racing:
                    # Nobody drifts away from the context while the others have their turns.
                    stand(children[name], context)
                    found = children[name].ask("decode", tokens=arguments.tokens + 1)
                    times[name].append(found["times"][1:])
            bandwidth.setdefault(str(context), streamed)
            for name, rounds in times.items():
                rows[name][str(context)] = summary(rounds, racing[name])
                print(f"{context} {name} {rows[name][str(context)]}", file=sys.stderr)
    return rows


def _child(name: str, arguments: argparse.Namespace, longest: int) -> Child:
    return Child(name, arguments.work, arguments.threads, longest, arguments.read_limit)


def summary(rounds: list[list[float]], how: str) -> dict[str, Any]:
    flat = sorted(t * 1e3 for times in rounds for t in times)
    low, middle, high = statistics.quantiles(flat, n=4)
    return {
        "ms_per_token": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "turns_ms": [round(statistics.median(times) * 1e3, 3) for times in rounds],
        "context": how,
    }


def prefill(names: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds to read a prompt into a fresh cache, contestants in turns."""
    rows: dict[str, Any] = {}
    names = [name for name in names if name in arguments.contestants]
    names = [name for name in names if kind_of(name)[0] != "genai-graph"]
    with ExitStack() as stack:
        children = {}
        for name in names:
            if reason := missing(name, arguments.work):
                rows[name] = {"refused": reason}
                continue
            child = _child(name, arguments, longest_of(name, arguments))
            children[name] = stack.enter_context(child)
            child.ask("load")
            child.ask("prefill", tokens=64)
        times: dict[str, list[float]] = {name: [] for name in children}
        for _ in range(arguments.prefill_rounds):
            for name, child in children.items():
                found = child.ask("prefill", tokens=arguments.prefill_tokens)
                times[name].append(found["seconds"])
        for name, found in times.items():
            rate = arguments.prefill_tokens / statistics.median(found)
            rows[name] = {
                "tokens_per_second": round(rate, 1),
                "turns_seconds": [round(t, 3) for t in found],
            }
            print(f"prefill {name} {rows[name]}", file=sys.stderr)
    return {"rows": rows, "tokens": arguments.prefill_tokens}


def memory(names: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Fresh processes, one at a time: load to first token, and memory at two contexts."""
    rows: dict[str, Any] = {}
    for name in (name for name in names if name in arguments.contestants):
        if reason := missing(name, arguments.work):
            rows[name] = {"refused": reason}
            continue
        row: dict[str, Any] = {}
        for context in (2048, 32768):
            with _child(name, arguments, context + 128) as child:
                load = child.ask("load")["seconds"]
                first = child.ask("first")
                if "seconds" in first and "load_to_first_token_seconds" not in row:
                    row["load_to_first_token_seconds"] = round(load + first["seconds"], 3)
                found = stand(child, context)
                if "refused" in found:
                    row[str(context)] = found
                    continue
                child.ask("decode", tokens=3)
                anonymous = child.ask("memory")["anonymous_bytes"]
                row[str(context)] = {
                    "anonymous_bytes": anonymous,
                    "over_imports_bytes": anonymous - child.imports_bytes,
                }
        rows[name] = row
        print(f"memory {name} {row}", file=sys.stderr)
    return {"rows": rows}


def linear(arguments: argparse.Namespace) -> dict[str, Any]:
    """Our prefill of 64k tokens against 8k, which is read before and after it."""
    rows: dict[str, Any] = {}
    for name in (name for name in LINEAR if name in arguments.contestants):
        if reason := missing(name, arguments.work):
            rows[name] = {"refused": reason}
            continue
        long, short = arguments.linear_tokens, arguments.linear_tokens // 8
        with Child(name, arguments.work, arguments.threads, 0) as child:
            child.ask("load")
            child.ask("prefill", tokens=min(short, WINDOW))
            before, whole, after = (
                child.ask("prefill", tokens=count)["seconds"] for count in (short, long, short)
            )
        rows[name] = {
            "seconds": {
                str(short): [round(before, 3), round(after, 3)],
                str(long): round(whole, 3),
            },
            "ratio": round(2 * whole / (before + after), 3),
        }
        print(f"linear {name} {rows[name]}", file=sys.stderr)
    return {"rows": rows}


def twin(arguments: argparse.Namespace) -> dict[str, Any]:
    """Our decoding far away against a twin at 4,096: two processes, which swap places every turn.

    So what one process owes to where its memory lies counts on both sides.
    """
    rows: dict[str, Any] = {}
    for name in (name for name in arguments.contestants if kind_of(name)[0] in OURS):
        if reason := missing(name, arguments.work):
            rows[name] = {"refused": reason}
            continue
        with ExitStack() as stack:
            pair = [
                stack.enter_context(_child(name, arguments, longest_of(name, arguments)))
                for _ in TWINS
            ]
            for child in pair:
                child.ask("load")
                stand(child, TWINS[0])
                child.ask("decode", tokens=3)
            turns: dict[int, list[float]] = {position: [] for position in TWINS}
            for number in range(arguments.twin_rounds):
                for place, child in enumerate(pair):
                    position = TWINS[(number + place) % 2]
                    stand(child, position)
                    times = child.ask("decode", tokens=arguments.tokens + 1)["times"][1:]
                    turns[position].append(statistics.median(times))
        near, far = TWINS
        ratio = statistics.median(turns[far]) / statistics.median(turns[near])
        rows[name] = {
            "turns_ms": {str(p): [round(t * 1e3, 3) for t in turns[p]] for p in TWINS},
            "ms_per_token": {str(p): round(statistics.median(turns[p]) * 1e3, 3) for p in TWINS},
            "ratio": round(ratio, 4),
        }
        print(f"twin {name} {rows[name]['ms_per_token']} {ratio:.4f}", file=sys.stderr)
    return {"rows": rows, "rounds": arguments.twin_rounds, "tokens_a_turn": arguments.tokens}


def floors(arguments: argparse.Namespace, before: float = 0.0) -> dict[str, Any]:
    """Return the time of streaming each of our bundles' bytes once, at every context.

    Args:
        arguments: threads, bundles and contexts.
        before: bandwidth found before the race, for machines whose bandwidth changes; the larger
            one counts.
    """
    bandwidth = max(before, streaming_bandwidth(arguments.threads))
    rows = {}
    for kind, precision in (kind_of(name) for name in arguments.contestants):
        if kind != "ours":
            continue
        bundle = Bundle.open(arguments.work / f"ours-{precision}")
        weights = weight_bytes_per_step(bundle, 1)
        rows[f"ours {precision}"] = {
            str(c): round((weights + cache_bytes_per_step(bundle, c)) / bandwidth * 1e3, 3)
            for c in arguments.contexts
        }
    return {"bandwidth_bytes_per_second": round(bandwidth), "floor_ms": rows}


def environment_with_peers() -> dict[str, Any]:
    found = environment()
    found["versions"]["onnxruntime-genai"] = version_in(sys.executable, "onnxruntime-genai")
    llama = python_of("llama.cpp")
    found["versions"]["llama-cpp-python"] = version_in(llama, "llama-cpp-python")
    return found


def version_in(python: str, package: str) -> str:
    asked = f"from importlib.metadata import version; print(version({package!r}))"
    told = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    return told.stdout.strip() or "not installed"


SECTIONS = {
    **{f"decode-{g}": lambda a, n=n: {**decode(n, a), **floors(a)} for g, n in GROUPS.items()},
    **{f"prefill-{g}": lambda a, n=n: prefill(n, a) for g, n in GROUPS.items()},
    **{f"memory-{g}": lambda a, n=n: memory(n, a) for g, n in GROUPS.items()},
    "linear": linear,
    "twin": twin,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["prepare", "run"])
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--read-limit", type=int, default=4096, help="longest context to read")
    parser.add_argument(
        "--peers-at-once", type=int, help="most peers in memory together; more decode in heats"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="decoded in one turn")
    parser.add_argument("--prefill-tokens", type=int, default=PREFILL)
    parser.add_argument("--prefill-rounds", type=int, default=3)
    parser.add_argument("--linear-tokens", type=int, default=LINEAR_TOKENS)
    parser.add_argument("--twin-rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    if arguments.action == "prepare":
        prepare(arguments.shape, work, [CONTESTANTS[name] for name in arguments.contestants])
        return
    result: dict[str, Any] = {}
    if arguments.out is not None and arguments.out.is_file():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
    sections = result.get("sections", {})
    for name in arguments.sections:
        started = time.perf_counter()
        found = SECTIONS[name](arguments)
        sections[name] = {
            **found,
            "threads": arguments.threads,
            "seconds": round(time.perf_counter() - started, 1),
            "environment": environment_with_peers(),
        }
    result = {
        "benchmark": "peers",
        "shape": arguments.shape,
        "model": SHAPES[arguments.shape],
        "window_size": WINDOW,
        "num_sink_tokens": SINKS,
        "sections": sections,
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
