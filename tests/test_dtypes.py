"""Element types: written down in one table, which agrees with every library that it names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

import lminf_export
from lminf_export.export.onnx_dtypes import dtype_name, onnx_dtype
from lminf_export.operator.settings import Dtype
from lminf_export.tensors.dtypes import BY_SAFETENSORS, ELEMENT_TYPES, MODEL_DTYPES, item_size
from lminf_export.tensors.files import read_header
from lminf_export.tensors.torch_dtypes import stored_torch_dtype, torch_dtype

PACKAGE = Path(lminf_export.__file__).parent
TABLE = Path("tensors/dtypes.py")


def listed_names(node: ast.AST) -> set[object]:
    """Return the strings that a dict, list, tuple or set lists."""
    if isinstance(node, ast.Dict):
        items: list[ast.expr | None] = [*node.keys, *node.values]
    elif isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        items = [*node.elts]
    else:
        return set()
    return {item.value for item in items if isinstance(item, ast.Constant)}


def literal_types(tree: ast.AST) -> set[int]:
    """Return the tuples inside `Literal[…]`, by identity: types cannot be made from a table."""
    return {
        id(node.slice)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "Literal"
    }


def test_no_other_file_lists_element_types():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE) == TABLE:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        types = literal_types(tree)
        for node in ast.walk(tree):
            names = listed_names(node) if id(node) not in types else set()
            assert not {"float16", "bfloat16"} <= names, f"{path}:{node.lineno} lists types"


def test_the_settings_have_the_types_of_the_table():
    assert get_args(Dtype) == MODEL_DTYPES


@pytest.mark.parametrize("name", ELEMENT_TYPES)
def test_libraries_agree_with_the_table(name, tmp_path):
    row = ELEMENT_TYPES[name]
    assert torch_dtype(name).itemsize == np.dtype(row.numpy).itemsize == row.itemsize
    assert onnx_dtype(name).itemsize == item_size(name)
    assert onnx.TensorProto.DataType.Value(row.onnx) == onnx_dtype(name)
    assert dtype_name(onnx_dtype(name)) == name
    kind = onnx.helper.tensor_dtype_to_string(onnx_dtype(name)).removeprefix("TensorProto.")
    assert row.onnxruntime == f"tensor({kind.lower()})"

    save_file({"x": torch.zeros(3).to(torch_dtype(name))}, tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors")["x"].dtype == row.safetensors
    assert stored_torch_dtype(row.safetensors) == torch_dtype(name)
    assert BY_SAFETENSORS[row.safetensors] is row


@pytest.mark.parametrize("name", [n for n, row in ELEMENT_TYPES.items() if row.numpy == n])
def test_numpy_has_the_types_that_bear_its_name(name):
    assert ir.DataType.from_numpy(np.dtype(name)) == onnx_dtype(name)


def test_the_table_needs_no_library():
    code = (
        "import sys, lminf_export.tensors.dtypes;"
        "assert not {'torch', 'onnx', 'onnx_ir', 'numpy', 'tensorrt'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
