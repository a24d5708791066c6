"""Draw perplexity against context length from the JSON of benchmarks/evaluation/perplexity.py.

python -m scripts.docs.plot_perplexity benchmarks/results/perplexity.json docs/perplexity.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

STYLES = {
    "stock": ("stock model, full attention", "#b2182b", "s"),
    "lambda": ("Λ export, bounded cache", "#2166ac", "o"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, rows in result["series"].items():
        label, colour, marker = STYLES[key]
        x = [row["context_tokens"] for row in rows]
        y = [row["perplexity"] for row in rows]
        low, high = zip(*(row["interval_95"] for row in rows), strict=True)
        axes.plot(x, y, label=label, color=colour, marker=marker, markersize=4)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axvline(result["training_length"], color="grey", linestyle=":", label="training length")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_yticks([25, 30, 40, 50, 60, 80, 100, 120])
    axes.set_xticks([row["context_tokens"] for row in result["series"]["lambda"]])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("perplexity of the same held-out tokens")
    axes.set_title(f"{result['model']}, window {result['lambda_config']['window_size']}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(arguments.picture, dpi=130)


if __name__ == "__main__":
    main()
