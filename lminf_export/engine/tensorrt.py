"""TensorRT proper: built on the machine with the GPU, with the plugin's fused kernels.

Not verified: no machine with TensorRT proper and a GPU has run this module yet. Its calls are
checked against the real bindings of 10.16 and 11.4; what differs between releases is looked up
by name.
"""

from __future__ import annotations

from typing import Any

from lminf_export.engine.child import build_in_child
from lminf_export.engine.common import EngineFacts, EngineRequest
from lminf_export.engine.options import TENSORRT
from lminf_export.errors import EngineError
from lminf_export.progress import Progress, silent
from lminf_export.runtime.gpu import find_gpu

NAME = TENSORRT
PACKAGE = "tensorrt"
INSTALL = "pip install 'lminf-export[tensorrt]' (from NVIDIA's package index)"
TAKES_PLUGIN = True


def build(request: EngineRequest, progress: Progress = silent) -> EngineFacts:
    """Build the plan in a child process, for the GPU of this machine.

    Raises:
        EngineError: there is no GPU, or naming what the builder refused; no plan is left behind.
    """
    require_machine()
    return build_in_child(NAME, request, progress)


def require_machine() -> None:
    """Check that this machine can build: TensorRT times its kernels on the GPU.

    Raises:
        EngineError: no GPU is usable.
    """
    gpu = find_gpu()
    if isinstance(gpu, str):
        raise EngineError(
            f"TensorRT builds on the GPU the plan is for, and none is usable here ({gpu}); "
            "build there with what --builder none writes, or use --builder tensorrt-rtx, which "
            "needs none"
        )


def target(trt: Any, config: Any) -> str:
    """Return the GPU a plan is for: the one of this machine.

    Args:
        trt: the imported `tensorrt`.
        config: its IBuilderConfig.
    """
    gpu = find_gpu()
    assert not isinstance(gpu, str), gpu
    return gpu.target
