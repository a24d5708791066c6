"""The tables of docs/evidence.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scripts.docs.tables import load, table

NAMES = {
    "lambda": "Λ export",
    "stock": "stock",
    "window": "window only",
    "streaming": "StreamingLLM",
    "recompute": "recompute",
}


def result_of(name: str) -> dict[str, Any]:
    """Return a result of benchmarks/evaluation/evidence.py, or FOLDER/NAME of another folder."""
    return load(name if "/" in name else f"evidence/{name}")


def perplexity(name: str) -> str:
    """Buckets from the training length on, every method on the same tokens."""
    result = result_of(name)
    length = result["training_length"]
    methods = {key: m for key, m in result["methods"].items() if key != "recompute"}
    rows = []
    for index, (low, high) in enumerate(result["buckets"]):
        if high < length:
            continue
        cells = [f"{low:,} – {high:,}", f"{high / length:,.0f}×"]
        for key, method in methods.items():
            row = method["by_bucket"][index]
            cells.append(_perplexity_cell(key, row))
        rows.append(cells)
    notes = [
        f"{NAMES[key]}: {method['stopped']} after {method['tokens_read']:,} tokens"
        for key, method in result["methods"].items()
        if method["stopped"]
    ]
    head = ["tokens before the target", "of training", *(NAMES[key] for key in methods)]
    return table(head, rows) + ("\n\n" + "; ".join(notes) + "." if notes else "")


def _perplexity_cell(key: str, row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if key != "lambda":
        return f"{row['perplexity']:.2f}"
    return f"{row['perplexity']:.2f} ({row['low']:.2f} – {row['high']:.2f})"


def recompute(name: str) -> str:
    """Λ against the last W tokens recomputed from nothing, on the same sampled targets."""
    result = result_of(name)
    rows = []
    pairs = zip(result["buckets"], result["methods"]["recompute"]["by_bucket"], strict=True)
    for (low, high), row in pairs:
        if row is None or high <= result["lambda_config"]["window_size"]:
            continue
        shares = row["lambda_over_this"]
        rows.append(
            [
                f"{low:,} – {high:,}",
                f"{row['targets']:,}",
                f"{row['lambda_on_the_same_targets']:.2f}",
                f"{row['perplexity']:.2f}",
                f"{shares['ratio']:.4f} ({shares['low']:.4f} – {shares['high']:.4f})",
            ]
        )
    return table(
        ["tokens before the target", "targets", "Λ export", "recompute", "Λ / recompute"], rows
    )


FACTORS = (1, 2, 4, 8, 16, 4096)


def paper(*names: str) -> str:
    """The paper's perplexities by length in training lengths, and below them ours."""
    rows = []
    for text in ("ArXiv", "OpenWebText2"):
        for row in result_of("paper")["rows"]:
            values = [row[text].get(str(factor * row["training_length"])) for factor in FACTORS]
            rows.append([row["model"], text, row["setting"], *map(_paper_cell, values)])
    for name in names:
        result = result_of(name)
        edges = {high: index for index, (_, high) in enumerate(result["buckets"])}
        for key in ("stock", "lambda"):
            found = [edges.get(factor * result["training_length"]) for factor in FACTORS]
            buckets = result["methods"][key]["by_bucket"]
            measured = [None if index is None else buckets[index] for index in found]
            values = [None if bucket is None else bucket["perplexity"] for bucket in measured]
            model = f"ours, {name.removeprefix('perplexity-')}"
            rows.append([model, "held out", NAMES[key], *map(_paper_cell, values)])
    return table(["model", "text", "setting", *(f"{factor:,}×" for factor in FACTORS)], rows)


def _paper_cell(value: float | str | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def ablation(*models: str) -> str:
    """One setting at a time, each model in a column."""
    results = {model: result_of(f"ablation-{model}") for model in models}
    rows = []
    for index, first in enumerate(results[models[0]]["rows"]):
        cells = [f"{SETTINGS[first['setting']]} = {first['value']}"]
        for result in results.values():
            row = result["rows"][index]
            shares = row["over_default"]
            cells.append(f"{row['perplexity']:.2f}")
            cells.append(f"{shares['ratio']:.4f} ({shares['low']:.4f} – {shares['high']:.4f})")
        rows.append(cells)
    head = ["setting"]
    for result in results.values():
        head += [f"{result['model']}", "over the default"]
    return table(head, rows)


SETTINGS = {"num_sink_tokens": "N", "window_size": "W", "distance_limit": "L"}


def passkey(name: str) -> str:
    """Exact answers and ranks; bold where the cache still holds the key."""
    result = result_of(name)
    depths = sorted({cell["depth"] for cell in result["cells"]})
    rows = []
    for factor in sorted({cell["windows"] for cell in result["cells"]}):
        cells = {c["depth"]: c for c in result["cells"] if c["windows"] == factor}
        tokens = sum(cell["tokens"] for cell in cells.values()) / len(cells)
        rows.append(
            [f"{factor:g}× ({tokens:.0f} tokens)", *(_passkey_cell(cells[d]) for d in depths)]
        )
    return table(["length, in windows", *(f"{depth:.0%}" for depth in depths)], rows)


def _passkey_cell(cell: dict[str, Any]) -> str:
    text = f"{cell['exact']:.0%} / {cell['rank_one']:.0%}"
    evicted = cell["key_is_in"].get("evicted", 0)
    return text if evicted * 2 > sum(cell["key_is_in"].values()) else f"**{text}**"


def generation(name: str) -> str:
    """Every segment of what was written, and the range of held-out segments below."""
    result = result_of(name)
    rows = [_segment(f"{row['from']:,} – {row['to']:,}", row) for row in result["segments"]]
    for row in (result["reference"] or {"segments": []})["segments"]:
        rows.append(_segment(f"held out, {row['from']:,} – {row['to']:,}", row))
    head = ["tokens", "perplexity", "distinct-1", "distinct-2", "distinct-4", "near repetition"]
    return table([*head, "longest repeat"], rows)


def _segment(label: str, row: dict[str, Any]) -> list[str]:
    shares = row["distinct"]
    return [
        label,
        f"{row['perplexity']:.2f}",
        *(f"{shares[n]:.3f}" for n in ("1", "2", "4")),
        f"{row['near_repetition']:.3f}",
        str(row["longest_repeat"]),
    ]


def far(name: str) -> str:
    """Attention of the stock models beyond the training length, by layer."""
    shares = result_of(name)["share_by_layer"]
    head = ["stock model", *(f"layer {i}" for i in range(len(next(iter(shares.values())))))]
    return table(head, [[model, *(f"{x:.1%}" for x in row)] for model, row in shares.items()])


def models(*names: str) -> str:
    """Perplexity of the models on held-out text, beside a 5-gram model on the same tokens."""
    rows = []
    for name in names:
        record = result_of(f"training-{name}")
        seen = record["tokens_seen"] + record.get("copying", {}).get("tokens_seen", 0)
        for text, values in record["heldout"].items():
            neural, ngram = values["model"], values["kneser_ney_5gram"]
            rows.append(
                [
                    name,
                    text,
                    f"{values['tokens']:,}",
                    f"{seen / 1e6:.1f} M",
                    f"{neural['perplexity_per_token']:.1f}",
                    f"{ngram['perplexity_per_token']:.1f}",
                    f"{neural['bits_per_byte']:.3f}",
                    f"{ngram['bits_per_byte']:.3f}",
                    f"{max(values['attention_on_first_token_by_layer']):.3f}",
                ]
            )
    return table(
        [
            *("model", "held-out text", "tokens", "trained on", "perplexity", "5-gram's"),
            *("bits per byte", "5-gram's", "most attention on the first token"),
        ],
        rows,
    )


TABLES: dict[str, Callable[..., str]] = {
    "perplexity": perplexity,
    "recompute": recompute,
    "ablation": ablation,
    "passkey": passkey,
    "generation": generation,
    "models": models,
    "far": far,
    "paper": paper,
}
