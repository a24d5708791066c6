"""The picture of the long readings, drawn from their JSON."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real.readings import unpacked_numbers
from lminf_export.evaluate.plots import STYLES, require_plotting

SHOWN = {
    "window": "window only: the last {window:,} tokens, no sinks",
    "stock": "full cache",
    "streaming": "StreamingLLM",
    "lambda": "Λ export: {sinks} sinks + the last {window:,} tokens",
}
FIRST = 512


def draw(readings: Path, picture: Path) -> None:
    """Draw perplexity by position, one line a method, in half octaves of the position.

    Args:
        readings: what `readings.Readings` wrote.
        picture: a name matplotlib can write, such as out.svg.
    """
    require_plotting(picture)
    import matplotlib as mpl
    from matplotlib import ticker
    from matplotlib.figure import Figure

    # The same file from the same numbers.
    mpl.rcParams["svg.hashsalt"] = "lminf"
    result = json.loads(readings.read_text(encoding="utf-8"))
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    base = result["rows"]["lambda"]["lambda_config"]
    for name, label in SHOWN.items():
        if name not in result["rows"]:
            continue
        x, y = curve(result["rows"][name], result["tokens_of_a_number"])
        colour, marker = STYLES[name]
        axes.plot(
            x, y, color=colour, marker=marker, markersize=4,
            linewidth=2.5 if name == "lambda" else 1.3,
            label=label.format(window=base["window_size"], sinks=base["num_sink_tokens"]),
        )  # fmt: skip
    trained = result["rows"]["lambda"]["training_length"]
    axes.axvline(trained, color="grey", linestyle=":", label="training length")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens before the predicted one")
    axes.set_ylabel("perplexity per token")
    axes.set_title(f"{result['model']['name']}, one stream of a novel and the next", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})


def curve(row: dict[str, Any], unit: int) -> tuple[list[float], list[float]]:
    """Return geometric middles of half octaves from FIRST on, and the perplexity in each."""
    nats = unpacked_numbers(row["nats"])
    edges = [FIRST]
    while edges[-1] < row["tokens"]:
        edge = round(FIRST * 2 ** (len(edges) / 2) / unit) * unit
        edges.append(min(row["tokens"], edge))
    x, y = [], []
    for low, high in pairwise(edges):
        part = nats[low // unit : high // unit]
        x.append(float(np.sqrt(low * high)))
        y.append(float(np.exp(part.mean())))
    return x, y
