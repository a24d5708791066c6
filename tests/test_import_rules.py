"""Who may import whom outside the package: scripts and benchmarks never import tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(path for top in ("scripts", "benchmarks") for path in (ROOT / top).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Modules a file imports, wherever in it, by their full names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_and_benchmarks_import_no_tests(path):
    assert not [name for name in imports(path) if name.partition(".")[0] == "tests"]


def test_benchmarks_import_no_scripts():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert not [name for name in imports(path) if name.partition(".")[0] == "scripts"], path


def test_no_test_module_imports_another():
    """Shared helpers are in tests/support and benchmarks/support; fixtures may be in conftest."""
    for path in (ROOT / "tests").rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] != "tests" or not any(x.startswith("test_") for x in parts), path
        assert "from tests.test_" not in path.read_text().replace('"from tests.test_"', ""), path
