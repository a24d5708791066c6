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
    for name, method in result["methods"].items():
        colour, marker = STYLES[name]
        rows = [(x, row) for x, row in zip(middle, method["by_bucket"], strict=True) if row]
        x = [place for place, _ in rows]
        axes.plot(
            x, [row["perplexity"] for _, row in rows],
            label=method["label"], color=colour, marker=marker, markersize=4,
        )  # fmt: skip
        axes.fill_between(
            x, [row["low"] for _, row in rows], [row["high"] for _, row in rows],
            color=colour, alpha=0.15, linewidth=0,
        )  # fmt: skip
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
