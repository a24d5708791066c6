"""TensorRT for RTX, where it is installed: it builds engines without a GPU."""

from __future__ import annotations

import importlib.util

import pytest

RTX = "tensorrt-rtx"
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed (pip install 'lminf-export[rtx]')",
)
