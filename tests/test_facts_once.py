"""Facts that must be written once are: who needs one asks the module that owns it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lminf_export.operator import contract

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lminf_export"
SHIPPED = [
    path for top in ("lminf_export", "scripts", "benchmarks") for path in (ROOT / top).rglob("*.py")
]
OPERANDS = {
    operand.name
    for int8_cache in (False, True)
    for operand in (
        *contract.inputs(int8_cache=int8_cache),
        *contract.outputs(int8_cache=int8_cache),
    )
}


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def literals(path: Path) -> Iterator[set[str]]:
    """The strings of every list, tuple, set and the keys of every dictionary in a module."""
    for node in nodes(path):
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            elements = node.elts
        elif isinstance(node, ast.Dict):
            elements = [key for key in node.keys if key is not None]
        else:
            continue
        yield {
            e.value for e in elements if isinstance(e, ast.Constant) and isinstance(e.value, str)
        }


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_operator_names_are_listed_nowhere_but_as_operands_of_the_contract():
    def lists_them(path: Path) -> bool:
        return any(len(found & OPERANDS) >= 5 for found in literals(path))

    assert not [relative(path) for path in SHIPPED if lists_them(path)]


def test_the_size_of_a_ring_is_computed_in_one_place():
    def computes(path: Path) -> bool:
        for node in nodes(path):
            if isinstance(node, ast.BinOp):
                named = {
                    n.id if isinstance(n, ast.Name) else n.attr
                    for n in ast.walk(node)
                    if isinstance(n, ast.Name | ast.Attribute)
                }
                if {"window_size", "chunk_size"} <= named:
                    return True
        return False

    assert [relative(p) for p in SHIPPED if computes(p)] == ["lminf_export/operator/settings.py"]
