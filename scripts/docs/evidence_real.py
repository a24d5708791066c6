"""The tables of a real model and of very long streams: docs/evidence.md and README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scripts.docs.tables import MIB, NotMeasuredError, load, table

NAMES = {
    "lambda": "Λ export",
    "window": "window only (N = 0)",
    "streaming": "StreamingLLM",
    "stock": "full cache",
    "transformers": "transformers",
    "recompute": "recompute",
    "lambda-int8-ring": "Λ export, int8 ring",
    "lambda-int8": "Λ export, int8 weights",
    "lambda-int4": "Λ export, int4 weights",
    "lambda-kept-blocks": "Λ export, the file's own blocks",
    "lambda-4096": "Λ export, W = 4,096",
    "window-4096": "window only, W = 4,096",
    "streaming-4096": "StreamingLLM, W = 4,096",
    "recompute-4096": "recompute, W = 4,096",
    "whale-lambda": "Λ export",
    "whale-window": "window only (N = 0)",
    "whale-stock": "full cache",
    "all-layers": "sinks in all layers",
}


def readings() -> dict[str, Any]:
    """Return the results of benchmarks/real/readings.py."""
    return load("real/readings")


def by_length(*names: str) -> str:
    """Perplexity by tokens before the target, one column a method, its ratio to Λ in brackets."""
    result = readings()
    rows = {name: result["summary"][name]["by_bucket"] for name in names if name in result["rows"]}
    if not rows:
        raise NotMeasuredError(names[0])
    longest = max(rows.values(), key=len)
    lines = []
    for index, span in enumerate(longest):
        cells = [f"{span['from']:,} – {span['to']:,}"]
        for found in rows.values():
            # A bucket that a shorter reading ends in is another bucket.
            same = index < len(found) and found[index]["to"] == span["to"]
            cells.append(_with_ratio(found[index]) if same else "–")
        lines.append(cells)
    return table(["tokens before the target", *(NAMES[name] for name in rows)], lines)


def _with_ratio(found: dict[str, Any]) -> str:
    text = f"{found['value']:.2f}"
    return f"{text} (× {found['over']['value']:.3f})" if "over" in found else text


def beyond(*names: str) -> str:
    """All rows behind twice the window: tokens, perplexity, ratio to Λ and the cache."""
    result = readings()
    lines = []
    for name in names:
        row = result["rows"].get(name)
        if row is None or "beyond" not in result["summary"][name]:
            continue
        found = result["summary"][name]["beyond"]
        config = row["lambda_config"]
        over = found.get("over")
        lines.append(
            [
                NAMES.get(name, name),
                f"{found['from']:,} – {found['to']:,}",
                f"{found['value']:.2f} ({found['low']:.2f} – {found['high']:.2f})",
                "1" if over is None else _interval(over),
                f"{row['cache_bytes'] / MIB:.1f}",
                "all" if row["settings"]["window_size"] >= row["tokens"] else
                f"{config['window_size']:,}",
                f"{config['num_sink_tokens']}" if "stock" not in name else "–",
            ]
        )  # fmt: skip
    if not lines:
        raise NotMeasuredError(names[0])
    head = ["", "tokens", "perplexity", "over Λ, same tokens", "cache, MiB", "W", "N"]
    return table(head, lines)


def around_training(*names: str) -> str:
    """Rows within the training length and behind it, each beside Λ on the same tokens."""
    result = readings()
    rows = {name: result["rows"][name] for name in names if name in result["rows"]}
    if not rows:
        raise NotMeasuredError(names[0])
    trained = next(iter(rows.values()))["training_length"]
    lines = []
    for name, row in rows.items():
        found = result["summary"][name]
        past = found.get("past")
        lines.append(
            [
                NAMES[name],
                _with_ratio(found["within"]),
                _with_ratio(past) if past else "–",
                f"{row['tokens']:,}",
                f"{row['cache_bytes'] / MIB:.1f}",
            ]
        )
    head = ["", f"perplexity to {trained:,} tokens (× Λ's)", "behind, as far as read (× Λ's)"]
    return table([*head, "tokens read", "cache, MiB"], lines)


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.4f} ({found['low']:.4f} – {found['high']:.4f})"


def in_words() -> str:
    """Sentences on sinks, the bounded cache and the length, as the rows have it."""
    result = readings()
    rows, found = result["rows"], result["summary"]
    if not {"lambda", "window", "stock"} <= rows.keys():
        raise NotMeasuredError("stock")
    ours, trained = rows["lambda"], rows["lambda"]["training_length"]
    window, stock = found["window"]["beyond"], found["stock"]["within"]
    buckets = found["lambda"]["by_bucket"]
    values = [bucket["value"] for bucket in buckets if bucket["from"] > BEYOND]
    sinks = ours["lambda_config"]["num_sink_tokens"]
    reach = f"{ours['tokens'] / trained:.2g} × the training length of {trained:,}"
    return (
        f"- **Sinks**: without its {sinks} sinks the same window reads "
        f"{window['over']['value'] - 1:.0%} worse (tokens {window['from']:,} – "
        f"{window['to']:,}, {_interval(window['over'])} times Λ's perplexity).\n"
        f"- **What the bounded cache costs**: the full cache reads "
        f"{1 - stock['over']['value']:.1%} better (tokens {stock['from']:,} – {stock['to']:,}, "
        f"{_interval(stock['over'])} times), and grows with every token.{past(found['stock'])}\n"
        f"- **Length**: read to {ours['tokens']:,} tokens, {reach}; perplexity by doubling of the "
        f"length lies between {min(values):.1f} and {max(values):.1f}, as the text has it; the "
        f"cache takes {ours['cache_bytes'] / MIB:.1f} MiB throughout."
    )


def past(stock: dict[str, Any]) -> str:
    """Say how the full cache does behind the training length, if it was read so far."""
    if "past" not in stock:
        return ""
    span = stock["past"]
    ratio = span["over"]["value"]
    how = f"{ratio - 1:.0%} worse" if ratio > 1 else f"{1 - ratio:.1%} better"
    return f" Behind the training length (to {span['to']:,}) it reads {how} than Λ."


def recompute() -> str:
    """Sampled targets from a context that was read afresh."""
    result, lines = readings(), []
    for name in ("recompute", "recompute-4096"):
        if name not in result["rows"]:
            continue
        row, found = result["rows"][name], result["summary"][name]["single"]
        lines.append(
            [
                f"{row['lambda_config']['window_size']:,}",
                f"{found['numbers']}",
                f"{found['value']:.2f}",
                _interval(found["over"]),
            ]
        )
    if not lines:
        raise NotMeasuredError("recompute")
    return table(["W", "targets", "perplexity", "over Λ, same targets"], lines)


# Tokens up to which all of them are in the window, or only just have left it.
BEYOND = 2048
ABLATION = (
    *(("N = 0", "window"), ("N = 1", "N=1"), ("N = 4", "N=4"), ("N = 16", "lambda")),
    *(("N = 64", "N=64"), ("W = 256", "W=256"), ("W = 512", "W=512"), ("W = 1,024", "lambda")),
    *(("W = 2,048", "W=2048"), ("W = 4,096", "lambda-4096"), ("L = 1,024", "lambda")),
    *(("L = 2,048", "L=2048"), ("L = 8,192", "L=8192"), ("L = 32,768", "L=32768")),
    ("sinks in all layers", "all-layers"),
)


def ablation() -> str:
    """One setting at a time, on the same tokens as the default."""
    result, lines = readings(), []
    for label, name in ABLATION:
        found = result["summary"].get(name, {}).get("short")
        if found is None:
            continue
        over = found.get("over")
        lines.append(
            [
                label,
                f"{found['from']:,} – {found['to']:,}",
                f"{found['value']:.2f}",
                "1" if over is None else _interval(over),
            ]
        )
    if len(lines) < 2:
        raise NotMeasuredError("ablation")
    return table(["setting", "tokens", "perplexity", "over the default"], lines)


def sources() -> str:
    """The texts and where they are from."""
    found = readings()["texts"]
    return table(
        ["text", "Debian package", "bytes", "SHA-256"],
        [
            [
                text["title"],
                f"`{text['debian_package']}` {text['package_version']}",
                f"{text['bytes']:,}",
                f"`{text['sha256'][:16]}…`",
            ]
            for text in found.values()
        ],
    )


# Ends of the segments that are shown of every stream.
GENERATED = (5000, 15_000, 25_000)


def generation() -> str:
    """Some segments of every written stream, by cache and by how tokens are drawn."""
    lines = []
    for name in ("", "-full-cache", "-top-p", "-full-cache-top-p"):
        try:
            result = load(f"real/generation{name}")
        except NotMeasuredError:
            continue
        for row in result["segments"]:
            if row["to"] not in GENERATED:
                continue
            window = f"{result['lambda_config']['window_size']:,} + sinks"
            lines.append(
                [
                    "full" if "full" in name else window,
                    f"{result['top_p']:g}",
                    f"{row['from']:,} – {row['to']:,}",
                    f"{row['perplexity']:.2f}",
                    f"{row['distinct']['4']:.3f}",
                    f"{row['near_repetition']:.3f}",
                    f"{row['longest_repeat']}",
                ]
            )
    if not lines:
        raise NotMeasuredError("generation")
    head = ["cache", "top-p", "tokens", "perplexity", "distinct-4", "near repetition"]
    return table([*head, "longest repeat"], lines)


def decode() -> str:
    """Milliseconds a token, contestants in turns; what a peer cannot do is said below."""
    sections = _sections("decode")
    rows, refusals = [], []
    contexts = list(next(iter(sections[0]["rows"].values())))
    for section in sections:
        for name, cells in section["rows"].items():
            rows.append([name, *(_milliseconds(cells.get(context, {})) for context in contexts)])
            said = {c["refused"] for c in cells.values() if "refused" in c}
            refusals += [f"{name}: {reason}" for reason in sorted(said)]
    text = table(["ms a token at position", *(f"{int(c):,}" for c in contexts)], rows)
    return text + ("\n\n" + "; ".join(refusals) + "." if refusals else "")


def _milliseconds(cell: dict[str, Any]) -> str:
    return f"{cell['ms_per_token']:.1f}" if "ms_per_token" in cell else "–"


def prefill_and_memory() -> str:
    """Prefill, time to load and memory of each contestant."""
    rows = []
    memory = {n: row for section in _sections("memory") for n, row in section["rows"].items()}
    for section in _sections("prefill"):
        for name, row in section["rows"].items():
            own = memory.get(name, {})
            sizes = [own.get(context, {}).get("anonymous_bytes") for context in ("2048", "32768")]
            first = own.get("load_to_first_token_seconds")
            rate = row.get("tokens_per_second")
            rows.append(
                [
                    name,
                    "–" if rate is None else f"{rate:.0f}",
                    "–" if first is None else f"{first:.2f}",
                    *("–" if size is None else f"{size / MIB:.0f}" for size in sizes),
                ]
            )
    head = ["", "prefill, tokens/s", "s to first token", "MiB at 2,048", "MiB at 32,768"]
    return table(head, rows)


def _sections(kind: str) -> list[dict[str, Any]]:
    found = load("real/speed")["sections"]
    names = [f"{kind}-{group}" for group in ("fp32", "quantized") if f"{kind}-{group}" in found]
    if not names:
        raise NotMeasuredError(kind)
    return [found[name] for name in names]


def long_reading(*models: str) -> str:
    """The marks of ten million tokens, each model in columns."""
    results = [load(f"evidence/long-reading-{model}") for model in models]
    lines = []
    for marks in zip(*(result["marks"] for result in results), strict=True):
        cells = [f"{marks[0]['tokens']:,}"]
        for mark in marks:
            cells += [f"{mark['perplexity']:.2f}", f"{mark['rss_bytes'] / MIB:.1f}"]
        lines.append(cells)
    head = ["tokens read"]
    for result in results:
        head += [f"{result['model']}: perplexity of this million", "resident, MiB"]
    return table(head, lines)


def same_again(*models: str) -> str:
    """Each reading of the text against the second one."""
    lines = []
    for model in models:
        result = load(f"evidence/long-reading-{model}")
        whole = [row for row in result["readings"] if row["reading"] > 1]
        values = [row["perplexity"] for row in whole]
        lines.append(
            [
                result["model"],
                f"{result['tokens']:,}",
                f"{len(whole)}",
                f"{min(values):.5f} – {max(values):.5f}",
                f"{result['largest_difference_nats']:.1e}",
                f"{result['marks'][-1]['cache_bytes'] / MIB:.2f}",
            ]
        )
    head = [
        "model",
        "tokens",
        "readings",
        "perplexity, lowest – highest",
        "largest difference of a",
    ]
    return table([*head[:-1], "largest difference of a token, nats", "cache, MiB"], lines)


def far_positions() -> str:
    """A million tokens across 200,000,000 against the same at the beginning."""
    result = load("evidence/far-positions")
    lines = []
    for row in result["rows"].values():
        moved, floor = row["moved"], row["floor"]
        lines.append(
            [
                row["model"],
                row["attention"],
                f"{row['from_position']:,} – {row['to_position']:,}",
                f"{moved['tokens_compared']:,}",
                f"{moved['largest_logit_difference']:.1e}",
                f"{moved['largest_logit_range']:.0f}",
                f"{moved['largest_difference_nats']:.1e}",
                f"{moved['same_argmax']:.4%}",
                f"{floor['largest_logit_difference']:.1e}",
            ]
        )
    head = ["model", "kernel", "positions", "tokens compared", "largest difference of a logit"]
    head += ["range of logits", "of a token's nats", "same argmax", "rounding alone"]
    return table(head, lines)


def far_in_words() -> str:
    """Return the same in one paragraph, of the row that differs most."""
    result = load("evidence/far-positions")
    row = max(result["rows"].values(), key=lambda found: found["moved"]["largest_logit_difference"])
    moved = row["moved"]
    return (
        f"**Across position {result['crossed']:,}**: a stream that stands at "
        f"{row['from_position']:,} and reads {moved['tokens_compared']:,} real tokens gives every "
        "logit that the same text gives from the beginning, within "
        f"{moved['largest_logit_difference']:.1e} of a range of "
        f"{moved['largest_logit_range']:.0f}; chunks of another size alone make a difference of "
        f"{row['floor']['largest_logit_difference']:.1e} ([evidence.md](docs/evidence.md))."
    )


TABLES: dict[str, Callable[..., str]] = {
    "real_by_length": by_length,
    "real_beyond": beyond,
    "real_around_training": around_training,
    "real_in_words": in_words,
    "real_recompute": recompute,
    "real_ablation": ablation,
    "real_texts": sources,
    "real_generation": generation,
    "real_decode": decode,
    "real_prefill_and_memory": prefill_and_memory,
    "long_reading": long_reading,
    "same_again": same_again,
    "far_positions": far_positions,
    "far_in_words": far_in_words,
}
