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


def wrappers() -> str:
    """A row for each multimodal type whose text model is exported."""
    results = load("wrappers")
    rows = [
        [
            f"`{name}`",
            f"`{row['text']}`",
            *(f"{row['errors'][way]:.1e}" for way in ("hub", "transformers", "graph")),
            f"times `{row['scale']}`" if row["scale"] else "",
        ]
        for name, row in results["rows"].items()
        if "errors" in row
    ]
    names = ("names of the hub", "names of transformers 5")
    head = ("model", "exported as", *names, "exported graph", "whole model")
    return f"{table(head, rows, numbers=False)}\n\n{_made_with(results, rows)}"


def refused_wrappers() -> str:
    """A row for each other multimodal type, with what an export says."""
    results = load("wrappers")
    rows = [
        [f"`{name}`", row.get("reason") or f"exported as `{row['text']}`, not compared"]
        for name, row in results["rows"].items()
        if "errors" not in row
    ]
    return f"{table(('model', 'outcome'), rows, numbers=False)}\n\n{_made_with(results, rows)}"


def _made_with(results: dict[str, Any], rows: list[list[str]]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{len(rows)} rows, made with {versions}."


TABLES: dict[str, Callable[..., str]] = {
    "families": families,
    "refused_wrappers": refused_wrappers,
    "versions": versions,
    "wrappers": wrappers,
}
