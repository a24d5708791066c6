"""The names users import: there in any order of imports, and documented."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lminf_export

ROOT = Path(__file__).resolve().parents[1]
ROOM = ROOT / "lminf_export"
FLAT = {"__init__.py", "disk.py", "errors.py", "progress.py", "py.typed"}


def test_type_checkers_and_python_find_the_same_names_in_the_same_modules():
    tree = ast.parse((ROOM / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    static = {alias.asname: node.module for node in imports for alias in node.names}
    homes = {name: f"lminf_export.{home}" for name, home in lminf_export._HOMES.items()}
    assert static == {**homes, "export": "lminf_export.export.run"}


def test_no_module_lies_flat_beside_the_packages():
    assert {path.name for path in ROOM.iterdir() if path.is_file()} == FLAT


ORDERS = list(
    itertools.permutations(
        (
            "import lminf_export",
            "import lminf_export.export.run",
            "from lminf_export import export",
        )
    )
)


@pytest.mark.sampled
@pytest.mark.parametrize("order", [*ORDERS, ("import lminf_export.cli.export",)])
def test_export_is_the_function_whatever_was_imported_first(order):
    code = "; ".join(
        [
            *order,
            "import inspect, lminf_export",
            "from lminf_export import export",
            "from lminf_export.export.run import export as function",
            "assert callable(export) and callable(lminf_export.export)",
            "assert inspect.signature(export) == inspect.signature(function)",
            "assert lminf_export.export.run.export is function",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_package_named_export_passes_arguments_on(tmp_path):
    with pytest.raises(TypeError, match="unknown_option"):
        lminf_export.export("model", tmp_path / "b", unknown_option=1)
    assert "window_size" in inspect.signature(lminf_export.export).parameters


@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("0", "0")])
def test_onnxruntime_reports_no_usage_unless_it_is_let(given, found):
    code = "import lminf_export, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    if given is not None:
        environment["ORT_DISABLE_TELEMETRY"] = given
    told = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env=environment, capture_output=True
    )
    assert told.stdout.decode().strip() == found


def test_a_session_leaves_nothing_of_onnxruntime_in_the_home_folder(tmp_path):
    code = "from lminf_export.runtime import onnxruntime; onnxruntime.ort.SessionOptions()"
    # Variables that would turn the reports off by themselves, or lead elsewhere.
    left_out = ("ORT_", "CI", "XDG_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=ROOT,
        env={**environment, "HOME": str(tmp_path)},
    )
    assert list(tmp_path.iterdir()) == []
