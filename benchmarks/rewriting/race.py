"""An int4 model of onnxruntime-genai and the same rewritten: cost, speed, and its end.

onnxruntime-genai's own builder writes the graph of a random checkpoint; `lminf_export.rewrite`
rewrites it in a fresh process, its check included (`cost.py`). Then both decode inside the window:
the rewritten one through this package's runtime, the original through onnxruntime-genai's
generator, greedily, and through a plain onnxruntime session whose caches are bound in place. Each
is a process of its own, stopped while another has its turn, and turns change their order; ratios
are of turns of one round. Last, a model of a short context: where it ends, and that its rewritten
form goes on (`beyond.py`).

    python -m benchmarks.rewriting.race --work FOLDER --out benchmarks/results/rewriting.json

Models that are in the folder already are kept. It takes about 7 minutes on two cores and 7 GB
of disk, and needs onnxruntime-genai.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.contestants import Child
from benchmarks.peers.race import version_in
from benchmarks.rewriting.beyond import original_stops, rewritten_goes_on
from benchmarks.rewriting.cost import rewrite_in_child
from benchmarks.support.checkpoints import SHAPES, write_checkpoint
from benchmarks.support.result import write_result
from lminf_export.bundle.folder import Bundle
from lminf_export.runtime.environment import describe_bundle, environment

REWRITTEN = "rewritten int4"
ORIGINAL = "onnxruntime-genai int4"
PLAIN = "onnxruntime-genai int4, its graph"
CONTEXT_LENGTH, WINDOW, SINKS = 2048, 2048, 16
SHORT_CONTEXT_LENGTH, SHORT_WINDOW, SHORT_SINKS = 256, 128, 4
LONGER = 4  # times the short context


class Contestant(Child):
    """A contestant's process."""

    worker = "benchmarks.rewriting.worker"


def built(work: Path, shape: str, context_length: int) -> Path:
    """Return the folder of onnxruntime-genai's graph; build what is missing of it."""
    folder = work / "genai-int4"
    if folder.exists():
        return folder
    if find_spec("onnxruntime_genai") is None:
        raise SystemExit("onnxruntime-genai is not installed; pip install '.[peers]'")
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        partial = work / "partial-checkpoint"
        shutil.rmtree(partial, ignore_errors=True)
        write_checkpoint(partial, SHAPES[shape], torch.float32, context_length)
        partial.rename(checkpoint)
    command = [
        *(sys.executable, "-m", "benchmarks.serving.genai_build", "--model", str(checkpoint)),
        *("--out", str(folder), "--precision", "int4"),
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    shutil.rmtree(checkpoint)
    return folder


def rewriting(work: Path, rounds: int) -> dict[str, Any]:
    """Rewrite the folder's graph some times; return the cost of each time."""
    model, out = work / "genai-int4", work / "rewritten-int4"
    turns = [rewrite_in_child(model, out, WINDOW, SINKS) for _ in range(rounds)]
    say("rewriting", turns)
    return {
        "model_bytes": sum(path.stat().st_size for path in model.iterdir()),
        "seconds": statistics.median(turn["seconds"] for turn in turns),
        "peak_anonymous_over_imports_bytes": max(
            turn["peak_anonymous_over_imports_bytes"] for turn in turns
        ),
        "turns": turns,
        "files": "in the page cache",
    }


def decoding(work: Path, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds a token at each context, contestants in turns."""
    names = (REWRITTEN, ORIGINAL, PLAIN)
    rows: dict[str, Any] = {}
    with ExitStack() as stack:
        children = {
            name: stack.enter_context(Contestant(name, work, threads, CONTEXT_LENGTH))
            for name in names
        }
        loaded = {name: asked(child, "load") for name, child in children.items()}
        for context in arguments.contexts:
            for child in children.values():
                asked(child, "stand", context=context)
                asked(child, "decode", tokens=4)
            turns: dict[str, list[float]] = {name: [] for name in names}
            for number in range(arguments.rounds):
                for name in names if number % 2 else names[::-1]:
                    # Nobody drifts away from the context while the others have their turns.
                    asked(children[name], "stand", context=context)
                    times = asked(children[name], "decode", tokens=arguments.tokens + 1)["times"]
                    turns[name].append(statistics.median(times[1:]) * 1e3)
            rows[str(context)] = compared(turns)
            say(f"{threads} threads, {context} tokens", rows[str(context)])
    return {"attention": loaded[REWRITTEN]["attention"], "rows": rows}


def asked(child: Child, do: str, **what: Any) -> dict[str, Any]:
    """Return a contestant's answer; all of them must be able to do all that is asked."""
    found = child.ask(do, **what)
    if "refused" in found:
        raise SystemExit(f"{child.name} cannot {do}: {found['refused']}")
    return found


def compared(turns: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians, and how many times as fast the rewritten graph is in each round."""
    found: dict[str, Any] = {}
    for name, times in turns.items():
        found[name] = {
            "ms_per_token": round(statistics.median(times), 3),
            "turns_ms": [round(ms, 3) for ms in times],
        }
        if name != REWRITTEN:
            ratios = [other / own for other, own in zip(times, turns[REWRITTEN], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            found[name]["rewritten_is_faster"] = {
                "median": round(middle, 3),
                "quartiles": [round(low, 3), round(high, 3)],
                "least": round(min(ratios), 3),
            }
    return found


def beyond(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return where a graph of a short context ends, and how the rewritten one goes on."""
    model = built(work, arguments.short_shape, SHORT_CONTEXT_LENGTH)
    out = work / "rewritten-int4"
    rewrite_in_child(model, out, SHORT_WINDOW, SHORT_SINKS)
    found = {
        "shape": arguments.short_shape,
        "bundle": describe_bundle(Bundle.open(out).manifest),
        "original": original_stops(model, SHORT_CONTEXT_LENGTH),
        "rewritten": rewritten_goes_on(out, LONGER * SHORT_CONTEXT_LENGTH, 1),
    }
    say("beyond", found)
    return found


def say(who: str, what: Any) -> None:
    print(f"{who}: {what}", file=sys.stderr, flush=True)


def measure(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all that is measured of one shape."""
    work = arguments.work / shape
    work.mkdir(parents=True, exist_ok=True)
    built(work, shape, CONTEXT_LENGTH)
    found: dict[str, Any] = {"rewriting": rewriting(work, arguments.rewrites)}
    found["bundle"] = describe_bundle(Bundle.open(work / "rewritten-int4").manifest)
    found["decoding"] = {
        str(threads): decoding(work, threads, arguments) for threads in arguments.threads
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for models")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["100m", "1b"])
    parser.add_argument("--short-shape", choices=SHAPES, default="100m")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 512, 1024])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=12, help="decoded in one turn")
    parser.add_argument("--rewrites", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    load = os.getloadavg()
    short = arguments.work / "short"
    short.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": "rewriting",
        "model": "random weights, int4 by onnxruntime-genai's builder for its CPU provider",
        "context_length": CONTEXT_LENGTH,
        "rounds": arguments.rounds,
        "tokens_a_turn": arguments.tokens,
        "shapes": {shape: measure(shape, arguments) for shape in arguments.shapes},
        "beyond": beyond(short, arguments),
        "load_average_before_and_after": [round(x, 2) for x in (load[0], os.getloadavg()[0])],
        **environment(),
    }
    result["versions"]["onnxruntime-genai"] = version_in(sys.executable, "onnxruntime-genai")
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
