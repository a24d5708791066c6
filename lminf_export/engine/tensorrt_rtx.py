"""TensorRT for RTX: builds on any x86-64 machine, with a GPU or without.

Verified with 1.7.1 on machines without a GPU: the build, its profiles and its cache updates.
The plan itself has not been executed there; kernels are compiled on the GPU that runs it.
"""

from __future__ import annotations

from typing import Any

from lminf_export.engine.child import build_in_child
from lminf_export.engine.common import EngineFacts, EngineRequest
from lminf_export.engine.options import TENSORRT_RTX
from lminf_export.progress import Progress, silent

NAME = TENSORRT_RTX
PACKAGE = "tensorrt_rtx"
INSTALL = "pip install 'lminf-export[rtx]'"
TAKES_PLUGIN = False

# With no target named, a plan serves compute capability 8.0 and later (NVIDIA's "CPU-only AOT"
# page); Turing would need a plan of its own.
_DEFAULT_TARGET = "sm_80+"


def build(request: EngineRequest, progress: Progress = silent) -> EngineFacts:
    """Build the plan in a child process.

    Raises:
        EngineError: naming what the builder refused; no plan is left behind.
    """
    return build_in_child(NAME, request, progress)


def require_machine() -> None:
    """Accept any machine: this builder needs no GPU."""


def target(trt: Any, config: Any) -> str:
    """Return the GPUs a plan of this builder configuration is for.

    Args:
        trt: the imported `tensorrt_rtx`.
        config: its IBuilderConfig.
    """
    count = config.num_compute_capabilities
    if count == 0:
        return _DEFAULT_TARGET
    names = [config.get_compute_capability(index).name for index in range(count)]
    return ",".join(f"sm_{name.removeprefix('SM')}" for name in names)
