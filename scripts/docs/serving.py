"""Commands and their output in docs/serving.md and docs/chat.md, as they were recorded."""

from __future__ import annotations

from lminf_export.cli.serve import LIMITS
from lminf_export.serve.metrics import described
from lminf_export.serve.settings import ServeSettings
from scripts.docs.tables import load, table


def served(*names: str) -> str:
    """Return steps of `record_serving` as a terminal shows them."""
    return _shown("serving", names)


def chatted(*names: str) -> str:
    """Return steps of `record_chat` as a terminal shows them."""
    return _shown("chat", names)


def _shown(result: str, names: tuple[str, ...]) -> str:
    steps = {step["name"]: step for step in load(result)["steps"]}
    shown = []
    for name in names:
        step = steps[name]
        shown.append(f"$ {step['command'].strip()}\n{step['output'].rstrip()}".rstrip())
    return "```\n" + "\n\n".join(shown) + "\n```"


def limits() -> str:
    """Return the options that bound what a client may ask for."""
    rows = [
        (f"`--{name}`", _number(getattr(ServeSettings, name.replace("-", "_"))), text)
        for name, (_, text) in LIMITS.items()
    ]
    return table(["option", "default", "of what"], rows, numbers=False)


def metrics() -> str:
    """Return every metric and its meaning."""
    rows = [(f"`{name}`", text) for name, text in described().items()]
    return table(["metric", "meaning"], rows, numbers=False)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,g}"


TABLES = {
    "served": served,
    "chatted": chatted,
    "serve_limits": limits,
    "serve_metrics": metrics,
}
