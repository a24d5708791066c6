"""The table of element types agrees with every library that it names.

That no other module lists element types is asserted in `test_facts_once.py`.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from lminf_export.export.onnx_dtypes import dtype_name, onnx_dtype
from lminf_export.tensors.dtypes import BY_SAFETENSORS, ELEMENT_TYPES, item_size
from lminf_export.tensors.files import read_header
from lminf_export.tensors.torch_dtypes import stored_torch_dtype, torch_dtype


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
