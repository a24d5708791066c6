"""The tables of docs/models.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scripts.docs.tables import load, table

HEAD = (
    *("model", "positions", "what is special"),
    *("inside the window", "after five windows", "exact with transformers", "engine"),
)


def families() -> str:
    """A row for each family that benchmarks/evaluation/families.py has measured."""
    results, matrix = load("models"), load("dependency_matrix")
    rows = [
        [
            f"`{name}`",
            row["position"],
            row["special"],
            *(f"{row[error]:.1e}" for error in ("stock", "oracle")),
            exact_versions(matrix, name),
            row.get("engine", "not tried"),
        ]
        for name, row in sorted(results["rows"].items())
    ]
    made_with = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{table(HEAD, rows, numbers=False)}\n\n{len(rows)} rows, measured with {made_with}."


def versions() -> str:
    """A row for each set of versions that scripts/checks/dependency_matrix.py has run."""
    results = load("dependency_matrix")
    packages = ("transformers", "torch", "onnxruntime", "onnx", "onnxscript")
    rows = []
    for lane, result in results["lanes"].items():
        errors = [
            max(row["stock"], row["oracle"])
            for row in result["rows"].values()
            if "error" not in row
        ]
        exact = sum(error < results["limit"] for error in errors)
        count = f"{exact} of {len(result['rows'])}"
        versions = (result["versions"][package] for package in packages)
        rows.append([lane, *versions, count, f"{max(errors):.1e}"])
    head = ("run", *packages, "exact", "largest error")
    return table(head, rows, numbers=False)


def exact_versions(results: dict[str, Any], name: str) -> str:
    """Return the releases of transformers for which a row was exact: "5.13.0, 5.23.0"."""
    found = {
        tuple(map(int, version.split("."))): version
        for result in results["lanes"].values()
        if (row := result["rows"].get(name)) and "error" not in row
        if max(row["stock"], row["oracle"]) < results["limit"]
        for version in [result["versions"]["transformers"]]
    }
    return ", ".join(version for _, version in sorted(found.items()))


TABLES: dict[str, Callable[..., str]] = {"families": families, "versions": versions}
