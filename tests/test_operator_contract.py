"""The operator's inputs, outputs and attributes are written once; the rest follows from there."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from lminf_export.operator import contract
from scripts.docs import operator_contract
from scripts.gpu.kernel_library import Params

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = ROOT / "plugins"
OPERANDS = (*contract.inputs(key_bias=True), *contract.outputs(int8_cache=True))
# Other operators have words of their own for these.
SHARED_WORDS = {"output", "scale"}


def holders(pattern: str) -> set[str]:
    """The sources of the libraries that a pattern is found in."""
    folders = [folder for folder in PLUGINS.iterdir() if folder.is_dir() and folder.name != "tests"]
    ends = ("h", "cpp", "cc", "cu", "cuh")
    sources = [p for folder in folders for end in ends for p in folder.rglob(f"*.{end}")]
    return {
        str(path.relative_to(PLUGINS))
        for path in sources
        if re.search(pattern, path.read_text("utf-8"))
    }


def test_a_changed_contract_makes_the_header_and_the_table_stale(monkeypatch):
    before = operator_contract.header(), operator_contract.attributes()
    first, *others = contract.ATTRIBUTES
    monkeypatch.setattr(contract, "ATTRIBUTES", (*others, first))
    assert operator_contract.header() != before[0]
    assert operator_contract.attributes() != before[1]


@pytest.mark.parametrize("name", sorted({x.name for x in (*OPERANDS, *contract.ATTRIBUTES)}))
def test_no_other_source_of_the_plugins_writes_a_name_down(name):
    if name in SHARED_WORDS:
        pytest.skip("a word that other operators use too")
    assert holders(rf'"{name}"') == {"operator/contract.h"}


def test_the_ring_rule_is_written_once():
    found = holders(r"window(_size|Size)\w* \+ [\w.]+ - 1\b")
    assert found == {"operator/rules.h", "operator/rules.cpp"}


def test_the_tests_binding_has_the_fields_of_the_contract():
    names = [name for name, _ in Params._fields_]
    assert names[: len(OPERANDS)] == [operand.name for operand in OPERANDS]
    kinds = dict(Params._fields_)
    for attribute in contract.ATTRIBUTES:
        assert (
            kinds[attribute.name]
            is {"int": ctypes.c_int64, "float": ctypes.c_float}[attribute.kind]
        )
