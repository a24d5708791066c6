"""The tables of docs/performance.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import chain
from typing import Any

from scripts.docs import serving_numbers, step
from scripts.docs.tables import GIB, MIB, NotMeasuredError, load, table


def peers(shape: str, section: str) -> dict[str, Any]:
    """One section of a race.

    Raises:
        NotMeasuredError: there is no result of it.
    """
    sections = load(f"peers-{shape}")["sections"]
    if section not in sections:
        raise NotMeasuredError(section)
    return sections[section]


def measured(shape: str, *sections: str) -> list[dict[str, Any]]:
    """Those of a race's sections that have been run, at least one.

    Raises:
        NotMeasuredError: there is none.
    """
    found = load(f"peers-{shape}")["sections"]
    if not found.keys() & set(sections):
        raise NotMeasuredError(", ".join(sections))
    return [found[section] for section in sections if section in found]


def decode(shape: str, group: str) -> str:
    """Milliseconds a token at every context, and the floor of ours."""
    found = peers(shape, f"decode-{group}")
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
    """Return a contestant's times in the heats of others, which the others' rows hold."""
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
    rows, sections = [], measured(shape, "prefill-fp32", "prefill-int4")
    for found in sections:
        for name, row in found["rows"].items():
            rate = "–" if "refused" in row else f"{row['tokens_per_second']:.0f}"
            rows.append([name, rate])
    head = [f"prompt of {sections[-1]['tokens']} tokens", "tokens/s"]
    return table(head, rows) + origin(sections[-1])


def memory(shape: str) -> str:
    rows, sections = [], measured(shape, "memory-fp32", "memory-int4")
    for found in sections:
        for name, row in found["rows"].items():
            sizes = [row.get(c, row) for c in ("2048", "32768")]
            cells = [
                "–" if "refused" in size else f"{size['anonymous_bytes'] / MIB:.0f}"
                for size in sizes
            ]
            first = row.get("load_to_first_token_seconds")
            rows.append([name, *cells, "–" if first is None else f"{first:.2f}"])
    head = ["", "MiB at 2,048", "MiB at 32,768", "s to first token"]
    return table(head, rows) + origin(sections[-1])


def linear(shape: str) -> str:
    """Whether reading a prompt of eight times the length takes eight times as long."""
    found = peers(shape, "linear")
    rows = []
    for name, row in found["rows"].items():
        if "refused" in row:
            continue
        short, long = row["seconds"]
        cells = [statistics.mean(row["seconds"][short]), row["seconds"][long]]
        rows.append([name, *(f"{seconds:.1f}" for seconds in cells), f"{row['ratio']:.2f}"])
        head = ["s to read tokens", f"{int(short):,}", f"{int(long):,}", "ratio"]
    if not rows:
        raise NotMeasuredError("linear")
    return table(head, rows) + origin(found)


def twin(shape: str) -> str:
    """Decoding far away against a twin nearby."""
    found = peers(shape, "twin")
    rows = [
        [name, *(f"{ms:.2f}" for ms in row["ms_per_token"].values()), f"{row['ratio'] - 1:+.1%}"]
        for name, row in found["rows"].items()
        if "refused" not in row
    ]
    return table(["ms a token at", "4,096", "1,000,000", "difference"], rows) + origin(found)


def large() -> str:
    found = load("large_export")
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
        text += "\n\n" + table(head, engines)
    return text + where(found)


def plans() -> str:
    found = load("quantized_plans")
    rows = [
        [row["weights"], f"{row['weights_bytes'] / MIB:.2f}", f"{row['plan_bytes'] / MIB:.2f}"]
        for row in found["rows"]
    ]
    return table(["weights", "MiB", "plan, MiB"], rows) + where(found, found["builder"])


def quantization() -> str:
    found = load("quantization")
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


def cache_perplexity() -> str:
    found = load("kv_cache-perplexity")
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
    found = load("kv_cache-decode")
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


def ring_rounding() -> str:
    found = load("ring_rounding")
    biases = {"none": "–", "slow": "in one slow dimension", "all": "in all dimensions"}
    rows = [
        [
            f"{row['model']}, {row['head_dim']}",
            f"{row['norm']:.0f}, {biases[row['bias']]}" if row["norm"] else "–",
            row["rounding"],
            f"{row['mean_error']:.2e}",
            f"{row['perplexity']:.1f}",
            f"{row['cost']:+.2%} ± {row['standard_error']:.2%}",
        ]
        for row in found["rows"]
    ]
    head = ["model, D", "bias", "rounding of the rings", "mean error", "perplexity", "cost"]
    return table(head, rows) + where(found)


def ring_types() -> str:
    found = load("ring_types")
    exact = found["rows"][0]
    rows = [
        [
            row["rings"],
            f"{row['cache_bytes'] / exact['cache_bytes']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['cost']:+.2%} ± {row['standard_error']:.2%}",
            f"{row['perplexity_behind_the_window']:.3f}",
        ]
        for row in found["rows"]
    ]
    settings = exact["lambda_config"]
    what = (
        f"\n\n{found['model']}, W = {settings['window_size']}, N = {settings['num_sink_tokens']}, "
        f"{exact['tokens']:,} predictions."
    )
    head = ["rings", "bytes", "perplexity", "cost", "behind the window"]
    return table(head, rows) + what + where(found, f"{found['threads']} thread")


def key_bias() -> str:
    found = load("key_bias")
    rows = [
        [
            f"{row['num_heads']}, {row['num_kv_heads']}, {row['head_dim']}",
            f"{row['window_size']:,}",
            f"{row['tokens']}",
            f"{row['ms']['none']:.3f}",
            f"{row['ms']['bias']:.3f}",
            f"{row['ratio']:.2f}",
        ]
        for row in found["rows"]
    ]
    head = ["H, G, D", "window", "tokens", "no bias, ms", "bias kept out, ms", "ratio"]
    return table(head, rows) + where(found, "1 thread")


def origin(found: dict[str, Any]) -> str:
    return where(found["environment"], f"{found['threads']} thread")


def where(environment: dict[str, Any], more: str = "") -> str:
    versions = ", ".join(
        f"{name} {version}"
        for name, version in environment["versions"].items()
        if version != "not installed" and name != "onnx"
    )
    threads = f", {more}" if more else ""
    return f"\n\n{environment['device']}, {environment['cores']} cores{threads}; {versions}."


TABLES: dict[str, Callable[..., str]] = {
    "decode": decode,
    "ratios": ratios,
    "prefill": prefill,
    "memory": memory,
    "linear": linear,
    "twin": twin,
    "large": large,
    "plans": plans,
    "quantization": quantization,
    "cache-perplexity": cache_perplexity,
    "cache-decode": cache_decode,
    "ring-rounding": ring_rounding,
    "ring-types": ring_types,
    "key-bias": key_bias,
    "drawing": step.drawing,
    "gguf-race": step.gguf_race,
    **serving_numbers.TABLES,
}
