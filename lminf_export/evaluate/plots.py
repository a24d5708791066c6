"""Pictures of evaluations, by matplotlib where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lminf_export.errors import InputError

STYLES = {
    "lambda": ("#2166ac", "o"),
    "stock": ("#b2182b", "s"),
    "window": ("#f4a582", "v"),
    "streaming": ("#1b7837", "^"),
    "recompute": ("#762a83", "D"),
    "reference": ("#777777", "x"),
}


def require_plotting(path: Path) -> None:
    """Raise InputError, before hours of work, if no picture can be drawn there."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "--plot needs matplotlib: pip install 'lminf-export[plot]', or leave it out"
        ) from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    del matplotlib
    known = FigureCanvasAgg.filetypes
    if path.suffix.lower().lstrip(".") not in known:
        raise InputError(f"--plot {path}: must end in one of .{', .'.join(sorted(known))}")


def plot_perplexity(result: dict[str, Any], path: Path) -> None:
    """Draw perplexity against context length, one line a method, the training length marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    middle = [(low * high) ** 0.5 for low, high in result["buckets"]]
    own = result["methods"]["lambda"]["by_bucket"]
    for name, method in result["methods"].items():
        colour, marker = STYLES[name]
        points = [
            (x, *_curve(row, beside, name == "recompute"))
            for x, row, beside in zip(middle, method["by_bucket"], own, strict=True)
            if row
        ]
        x, y, low, high = zip(*points, strict=True) if points else ((), (), (), ())
        axes.plot(
            x, y, label=method["label"], color=colour, marker=marker, markersize=4,
            linewidth=2.5 if name == "lambda" else 1.2, alpha=0.9,
        )  # fmt: skip
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    if result["training_length"]:
        axes.axvline(
            result["training_length"], color="grey", linestyle=":", label="training length"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _plain_numbers(axes)
    axes.set_xlabel("tokens before the predicted one")
    axes.set_ylabel("perplexity per token")
    settings = result["lambda_config"]
    axes.set_title(
        f"{result['model']}: window {settings['window_size']}, "
        f"{settings['num_sink_tokens']} sink tokens",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _curve(
    row: dict[str, Any], beside: dict[str, Any], sampled: bool
) -> tuple[float, float, float]:
    """Perplexity and interval as drawn; of sampled targets relative to Λ's on the same ones."""
    if not sampled:
        return row["perplexity"], row["low"], row["high"]
    shares, level = row["lambda_over_this"], beside["perplexity"]
    return level / shares["ratio"], level / shares["high"], level / shares["low"]


def _plain_numbers(axes: Any) -> None:
    from matplotlib import ticker

    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    for axis in (axes.yaxis,):
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(ticker.FuncFormatter(_sparse_label))
        axis.set_tick_params(which="minor", labelsize=7)


def _sparse_label(value: float, _: int) -> str:
    """Label 2, 3 and 5 times a power of ten only."""
    digit = round(value / 10 ** int(f"{value:e}".split("e")[1]))
    return f"{value:g}" if digit in (2, 3, 5) else ""


def _save(figure: Any, path: Path) -> None:
    """Write the picture beside its place, then put it there."""
    fresh = path.with_name(f".new-{path.name}")
    try:
        figure.savefig(fresh, dpi=130)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def plot_passkey(result: dict[str, Any], path: Path) -> None:
    """Draw accuracy over length and depth; frames say where the key is when it is asked for."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    cells = result["cells"]
    factors = sorted({cell["windows"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    figure = Figure(figsize=(10, 0.5 * len(depths) + 1.9), layout="constrained")
    titles = {"exact": "exact answers", "rank_one": "right key likeliest of "}
    titles["rank_one"] += f"{result['candidates']} (chance {result['chance_of_rank_one']:.0%})"
    all_axes = figure.subplots(1, 2)
    for axes, (field, title) in zip(all_axes, titles.items(), strict=True):
        grid = [[0.0] * len(factors) for _ in depths]
        for cell in cells:
            column, row = factors.index(cell["windows"]), depths.index(cell["depth"])
            grid[row][column] = cell[field]
            dark = cell[field] > 0.6
            axes.text(
                column, row, f"{cell[field]:.0%}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip
            if max(cell["key_is_in"], key=cell["key_is_in"].get) != "evicted":
                axes.add_patch(
                    Rectangle(
                        (column - 0.47, row - 0.45), 0.94, 0.9, fill=False, edgecolor="#d6604d"
                    )
                )
        axes.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(factors)), [f"{factor:g}" for factor in factors])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("length of the text, in windows")
        axes.set_title(title, fontsize=9)
    all_axes[0].set_ylabel("depth of the key")
    figure.suptitle(
        f"{result['model']}: framed where window or sinks hold the key at the question", fontsize=9
    )
    _save(figure, path)


def plot_generation(result: dict[str, Any], path: Path) -> None:
    """Draw perplexity, variety and repetition of what was written, by position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = {
        "perplexity": lambda row: row["perplexity"],
        "distinct-4": lambda row: row["distinct"]["4"],
        "tokens seen in the 128 before": lambda row: row["near_repetition"],
    }
    reference = result["reference"]["segments"] if result["reference"] else []
    for axes, (name, read) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        rows = result["segments"]
        middle = [(row["from"] + row["to"]) / 2 for row in rows]
        axes.plot(middle, [read(row) for row in rows], color="#2166ac", marker="o", markersize=3)
        if reference:
            values = [read(row) for row in reference]
            axes.axhspan(
                min(values), max(values), color="grey", alpha=0.2, label="held-out text, segments"
            )
            axes.legend(frameon=False, fontsize=7)
        axes.set_ylim(bottom=0)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("tokens written")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{result['model']}, {result['tokens']:,} tokens in one stream", fontsize=9)
    _save(figure, path)
