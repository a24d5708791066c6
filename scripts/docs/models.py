"""The table of docs/models.md."""

from __future__ import annotations

from collections.abc import Callable

from scripts.docs.tables import load, table

HEAD = (
    *("model", "positions", "what is special"),
    *("inside the window", "after five windows", "ONNX", "engine"),
)


def families() -> str:
    """A row for each family that benchmarks/evaluation/families.py has measured."""
    results = load("models")
    rows = [
        [
            f"`{name}`",
            row["position"],
            row["special"],
            *(f"{row[error]:.1e}" for error in ("stock", "oracle")),
            "yes",
            row.get("engine", "not tried"),
        ]
        for name, row in sorted(results["rows"].items())
    ]
    made_with = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{table(HEAD, rows, numbers=False)}\n\n{len(rows)} rows, measured with {made_with}."


TABLES: dict[str, Callable[..., str]] = {"families": families}
