"""Facts that must be written once are: who needs one asks the module that owns it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

from lminf_export.operator import contract
from lminf_export.operator.settings import Dtype
from lminf_export.tensors.dtypes import ELEMENT_TYPES, MODEL_DTYPES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lminf_export"
SHIPPED = [
    path for top in ("lminf_export", "scripts", "benchmarks") for path in (ROOT / top).rglob("*.py")
]
OPERANDS = {
    operand.name
    for operand in (*contract.inputs(key_bias=True), *contract.outputs(int8_cache=True))
}
ROUTER_SETTINGS = {"num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"}


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def strings(path: Path) -> set[str]:
    """The string constants of a module."""
    found = (node.value for node in nodes(path) if isinstance(node, ast.Constant))
    return {value for value in found if isinstance(value, str)}


def literals(path: Path) -> Iterator[set[str]]:
    """The strings of every list, tuple, set and dictionary in a module, keys and values.

    Arguments of types such as Literal are not among them.
    """
    arguments = {node.slice for node in nodes(path) if isinstance(node, ast.Subscript)}
    for node in nodes(path):
        if node in arguments:
            continue
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            elements = node.elts
        elif isinstance(node, ast.Dict):
            elements = [*(key for key in node.keys if key is not None), *node.values]
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


def test_element_types_are_listed_in_one_module():
    rows = [ELEMENT_TYPES[name] for name in MODEL_DTYPES]
    names = {name for row in rows for name in (row.name, row.safetensors, row.onnx)}

    def lists_them(path: Path) -> bool:
        return any(len(found & names) >= 2 for found in literals(path))

    found = [relative(path) for path in PACKAGE.rglob("*.py") if lists_them(path)]
    assert found == ["lminf_export/tensors/dtypes.py"]
    assert get_args(Dtype) == MODEL_DTYPES


def test_settings_of_routers_are_known_to_families_only():
    known = [relative(path) for path in PACKAGE.rglob("*.py") if strings(path) & ROUTER_SETTINGS]
    assert known == ["lminf_export/models/expert_facts.py"]


def test_commands_take_choices_from_where_options_are_defined():
    for path in (PACKAGE / "cli").rglob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Choice":
                written = [n for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant)]
                assert len(written) < 2, f"{relative(path)}:{node.lineno}"  # one: no choice
