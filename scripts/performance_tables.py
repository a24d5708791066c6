"""Write the tables of docs/performance.md from benchmarks/results; `--check` only compares.

Each table stands between `<!-- NAME -->` and `<!-- end -->`; a table without results says so.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
NOTHING = "*No result yet.*\n"
MIB, GIB = 2**20, 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    arguments = parser.parse_args()
    before = DOCUMENT.read_text(encoding="utf-8")
    after = render(before)
    if arguments.check:
        sys.exit(before != after and "docs/performance.md is stale: run this script")
    DOCUMENT.write_text(after, encoding="utf-8")


def render(text: str) -> str:
    """Fill every table of the document."""
    for name, write in TABLES.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"docs/performance.md has no place for {name}")
        text = pattern.sub(lambda m, w=write: m[1] + w() + m[2], text)
    return text


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def peers(shape: str, section: str) -> dict[str, Any] | None:
    path = RESULTS / f"peers-{shape}.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["sections"].get(section)


def decode(shape: str, group: str) -> str:
    """Milliseconds a token at every context, and the floor of ours."""
    found = peers(shape, f"decode-{group}")
    if found is None:
        return NOTHING
    contexts = list(next(iter(found["rows"].values())))
    rows = []
    for name, cells in found["rows"].items():
        rows.append([name, *(cell(cells[c], beside(found["rows"], name, c)) for c in contexts)])
    for name, cells in found["floor_ms"].items():
        if name in found["rows"]:
            rows.append([f"floor of {name}", *(f"{cells[c]:.1f}" for c in contexts)])
    head = ["ms a token at", *(f"{int(c):,}" for c in contexts)]
    return table(head, rows) + origin(found)


def beside(rows: dict[str, Any], name: str, context: str) -> list[float]:
    """What a contestant's turns took in the heats of others, which their rows have."""
    turns = (row[context].get("against", {}).get(name) or [] for row in rows.values())
    return list(chain.from_iterable(turns))


def cell(found: dict[str, Any], elsewhere: list[float]) -> str:
    if "refused" in found:
        return "–"
    if elsewhere:
        return f"{statistics.median([*found['turns_ms'], *elsewhere]):.1f}"
    return f"{found['ms_per_token']:.1f}"


def ratios(shape: str, group: str) -> str:
    """How many times as fast as each peer, from turns that follow each other."""
    found = peers(shape, f"decode-{group}")
    if found is None:
        return NOTHING
    rows = []
    contexts = list(next(iter(found["rows"].values())))
    for ours in (name for name in found["rows"] if name.startswith("ours")):
        for peer, cells in found["rows"].items():
            if peer.startswith("ours"):
                continue
            values = [ratio(ours, found["rows"][ours][c], cells[c]) for c in contexts]
            rows.append([f"{ours} against {peer}", *values])
    return table(["tokens/s, times", *(f"{int(c):,}" for c in contexts)], rows)


def ratio(name: str, ours: dict[str, Any], peer: dict[str, Any]) -> str:
    if "refused" in ours or "refused" in peer:
        return "–"
    # A peer of a later heat was timed against other turns of ours.
    turns = peer.get("against", {}).get(name, ours["turns_ms"])
    pairs = zip(peer["turns_ms"], turns, strict=True)
    return f"{statistics.median(a / b for a, b in pairs):.2f}"


def prefill(shape: str) -> str:
    rows, last = [], None
    for group in ("fp32", "int4"):
        found = peers(shape, f"prefill-{group}")
        if found is None:
            continue
        last = found
        for name, row in found["rows"].items():
            rate = "–" if "refused" in row else f"{row['tokens_per_second']:.0f}"
            rows.append([name, rate])
    if last is None:
        return NOTHING
    return table([f"prompt of {last['tokens']} tokens", "tokens/s"], rows) + origin(last)


def memory(shape: str) -> str:
    rows, last = [], None
    for group in ("fp32", "int4"):
        found = peers(shape, f"memory-{group}")
        if found is None:
            continue
        last = found
        for name, row in found["rows"].items():
            sizes = [row.get(c, row) for c in ("2048", "32768")]
            cells = [
                "–" if "refused" in size else f"{size['anonymous_bytes'] / MIB:.0f}"
                for size in sizes
            ]
            first = row.get("load_to_first_token_seconds")
            rows.append([name, *cells, "–" if first is None else f"{first:.2f}"])
    if last is None:
        return NOTHING
    head = ["", "MiB at 2,048", "MiB at 32,768", "s to first token"]
    return table(head, rows) + origin(last)


def linear(shape: str) -> str:
    """Whether reading a prompt of eight times the length takes eight times as long."""
    found = peers(shape, "linear")
    if found is None:
        return NOTHING
    rows = []
    for name, row in found["rows"].items():
        if "refused" in row:
            continue
        short, long = row["seconds"]
        cells = [statistics.mean(row["seconds"][short]), row["seconds"][long]]
        rows.append([name, *(f"{seconds:.1f}" for seconds in cells), f"{row['ratio']:.2f}"])
        head = ["s to read tokens", f"{int(short):,}", f"{int(long):,}", "ratio"]
    return table(head, rows) + origin(found) if rows else NOTHING


def twin(shape: str) -> str:
    """Decoding far away against a twin nearby."""
    found = peers(shape, "twin")
    if found is None:
        return NOTHING
    rows = [
        [name, *(f"{ms:.2f}" for ms in row["ms_per_token"].values()), f"{row['ratio'] - 1:+.1%}"]
        for name, row in found["rows"].items()
        if "refused" not in row
    ]
    return table(["ms a token at", "4,096", "1,000,000", "difference"], rows) + origin(found)


def large() -> str:
    path = RESULTS / "large_export.json"
    if not path.is_file():
        return NOTHING
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [
            f"{model['shape']}, {export['export']}",
            f"{model['source_bytes'] / GIB:.1f}",
            f"{export['bundle_bytes'] / GIB:.1f}",
            f"{export['peak_anonymous_over_imports_bytes'] / MIB:.0f}",
            f"{export['traffic_over_needed']:.3f}",
            f"{export['seconds']:.0f}",
            f"{statistics.mean(export['copy_seconds']):.0f}",
        ]
        for model in found["models"]
        for export in model["exports"]
    ]
    head = [
        *("", "checkpoint, GiB", "bundle, GiB", "memory over imports, MiB"),
        *("disk traffic / needed", "s", "s to copy the checkpoint"),
    ]
    engines = [
        [
            f"{row['shape']}, {row['engine']}",
            f"{row['weights_bytes'] / GIB:.2f}",
            f"{row['plan_bytes'] / GIB:.2f}",
            f"{row['peak_anonymous_bytes'] / GIB:.2f}",
            f"{row['seconds']:.0f}",
        ]
        for row in found["engines"]
    ]
    text = table(head, rows)
    if engines:
        head = ["engine", "weights, GiB", "plan, GiB", "memory of its own, GiB", "s"]
        text += "\n" + table(head, engines)
    return text + where(found)


def plans() -> str:
    path = RESULTS / "quantized_plans.json"
    if not path.is_file():
        return NOTHING
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [row["weights"], f"{row['weights_bytes'] / MIB:.2f}", f"{row['plan_bytes'] / MIB:.2f}"]
        for row in found["rows"]
    ]
    return table(["weights", "MiB", "plan, MiB"], rows) + where(found, found["builder"])


def quantization() -> str:
    path = RESULTS / "quantization.json"
    if not path.is_file():
        return NOTHING
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [
            row["settings"],
            f"{row['weights_bytes'] / MIB:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['cost']:+.2%} ± {row['standard_error']:.2%}",
        ]
        for row in found["rows"]
    ]
    head = ["weights", "MiB", "perplexity", "cost"]
    first = ["not quantised", f"{found['full_bytes'] / MIB:.2f}", f"{found['perplexity']:.3f}", "–"]
    return table(head, [first, *rows]) + where(found)


def cache_cost() -> str:
    path = RESULTS / "kv_cache-perplexity.json"
    if not path.is_file():
        return NOTHING
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [
            f"{row['model']}, {row['text']}",
            f"{row['lambda_config']['window_size']}",
            f"{row['tokens']:,}",
            f"{row['perplexity']['float32']:.3f}",
            f"{row['perplexity']['int8']:.3f}",
            f"{row['cost']:+.3%} ± {row['standard_error']:.3%}",
            f"{row['cache_bytes_ratio']:.2f}",
        ]
        for row in found["rows"]
    ]
    head = ["model, text", "window", "tokens", "float32", "int8", "cost", "bytes"]
    return table(head, rows) + where(found)


def cache_decode() -> str:
    path = RESULTS / "kv_cache-decode.json"
    if not path.is_file():
        return NOTHING
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [
            f"{row['batch_size']}",
            f"{row['position']:,}",
            *(f"{row['live_cache_bytes'][name] / MIB:.1f}" for name in ("float32", "int8")),
            *(f"{row['ms_per_step'][name]:.1f}" for name in ("float32", "int8")),
            f"{row['int8_over_float32']:.3f}",
        ]
        for row in found["rows"]
    ]
    head = ["batch", "position", "float32, MiB", "int8, MiB", "float32, ms", "int8, ms", "ratio"]
    return table(head, rows) + where(found, f"{found['threads']} thread")


def origin(found: dict[str, Any]) -> str:
    return where(found["environment"], f"{found['threads']} thread")


def where(environment: dict[str, Any], more: str = "") -> str:
    versions = ", ".join(
        f"{name} {version}"
        for name, version in environment["versions"].items()
        if version != "not installed" and name != "onnx"
    )
    threads = f", {more}" if more else ""
    return f"\n{environment['device']}, {environment['cores']} cores{threads}; {versions}.\n"


TABLES: dict[str, Callable[[], str]] = {
    **{
        f"{kind.__name__} {shape} {group}": lambda k=kind, s=shape, g=group: k(s, g)
        for shape in ("100m", "1b")
        for group in ("fp32", "int4")
        for kind in (decode, ratios)
    },
    **{
        f"{kind.__name__} {shape}": lambda k=kind, s=shape: k(s)
        for shape in ("100m", "1b")
        for kind in (prefill, memory, twin)
    },
    "linear 100m": lambda: linear("100m"),
    "large": large,
    "plans": plans,
    "quantization": quantization,
    "kv_cache perplexity": cache_cost,
    "kv_cache decode": cache_decode,
}


if __name__ == "__main__":
    main()
