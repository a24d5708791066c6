"""Texts of the package in plain technical English: phrases that were hard to read stay out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for folder in ("lminf_export", "scripts", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
ODD = re.compile(
    r"of so many bits|what no more|nobody's then|\bfor ever\b|\bhas not (a|an|the|its)\b",
    re.IGNORECASE,
)
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@pytest.mark.parametrize("folder", ["lminf_export", "scripts", "benchmarks"])
def test_no_docstring_begins_with_what(folder):
    found = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in SOURCES
        if path.is_relative_to(ROOT / folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, DOCUMENTED)
        and (text := ast.get_docstring(node) or "").startswith("What ")
    ]
    assert not found


def test_no_odd_phrase_is_left():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in (*SOURCES, *PAGES)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if ODD.search(line)
    ]
    assert not found
