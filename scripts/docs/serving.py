"""Commands and their output in docs/serving.md, as `record_serving` has recorded them."""

from __future__ import annotations

from lminf_export.cli.serve import LIMITS
from lminf_export.serve.metrics import described
from lminf_export.serve.settings import ServeSettings
from scripts.docs.tables import load, table


def served(*names: str) -> str:
    """Return the recorded steps of these names as a terminal shows them."""
    steps = {step["name"]: step for step in load("serving")["steps"]}
    shown = []
    for name in names:
        step = steps[name]
        command = step["command"].strip().replace("\n", "\n  ")
        shown.append(f"$ {command}\n{step['output'].rstrip()}".rstrip())
    return "```\n" + "\n\n".join(shown) + "\n```"


def limits() -> str:
    """Return the options that bound what a client may ask for."""
    rows = [
        (f"`--{name}`", f"{getattr(ServeSettings, name.replace('-', '_')):,g}", text)
        for name, (_, text) in LIMITS.items()
    ]
    return table(["option", "default", "of what"], rows, numbers=False)


def metrics() -> str:
    """Return every metric and its meaning."""
    rows = [(f"`{name}`", text) for name, text in described().items()]
    return table(["metric", "meaning"], rows, numbers=False)


TABLES = {"served": served, "serve_limits": limits, "serve_metrics": metrics}
