"""From an exported graph to an engine's plan; one module for each builder.

Importing this imports no TensorRT. The build itself runs in a child process
(`lminf_export.build.child`), because a builder may crash and keeps memory for itself.
"""

from __future__ import annotations

import importlib.util
import logging
from types import MappingProxyType, ModuleType

from lminf_export.build import tensorrt, tensorrt_rtx
from lminf_export.build.common import LOGGER_NAME, EngineFacts, EngineRequest
from lminf_export.errors import EngineError
from lminf_export.manifest import Engine, human_bytes
from lminf_export.progress import Progress, silent

__all__ = [
    "EngineFacts",
    "EngineRequest",
    "available_builders",
    "build_engine",
    "select_builder",
]

_BUILDERS: MappingProxyType[str, ModuleType] = MappingProxyType(
    {module.NAME: module for module in (tensorrt, tensorrt_rtx)}
)
_INSTALL = (
    "pip install 'lminf-export[rtx]' builds on any x86-64 machine, "
    "'lminf-export[tensorrt]' needs a GPU"
)

logger = logging.getLogger(LOGGER_NAME)


def available_builders() -> tuple[str, ...]:
    """Return the names of the builders whose Python package is installed."""
    return tuple(
        name for name, module in _BUILDERS.items() if importlib.util.find_spec(module.PACKAGE)
    )


def select_builder(name: str | None) -> str:
    """Return the builder to use.

    Args:
        name: "tensorrt" or "tensorrt-rtx"; None takes the one that is installed.

    Raises:
        EngineError: an unknown name, a builder that is not installed, or no name where the
            choice is open.
    """
    available = available_builders()
    if name is not None:
        if name not in _BUILDERS:
            raise EngineError(f"builder={name!r}: must be one of {', '.join(_BUILDERS)}")
        if name not in available:
            raise EngineError(
                f"builder {name!r} is not installed (Python package "
                f"{_BUILDERS[name].PACKAGE}); {_BUILDERS[name].INSTALL}"
            )
        return name
    if not available:
        raise EngineError(
            f"an engine needs TensorRT and none is installed; {_INSTALL}; "
            "or write ONNX alone: --out with a folder or a .onnx file"
        )
    if len(available) > 1:
        raise EngineError(f"both {' and '.join(available)} are installed; say which with --builder")
    return available[0]


def build_engine(builder: str, request: EngineRequest, progress: Progress = silent) -> Engine:
    """Build a plan and return what the manifest records about it.

    Args:
        builder: from `select_builder`.
        request: what to build, and where to.
        progress: told which phase runs.

    Raises:
        EngineError: naming what the builder refused; no plan is left behind.
    """
    facts: EngineFacts = _BUILDERS[builder].build(request, progress)
    logger.info(
        "%s %s built %s (%s) in %.1f s: %s, %d rings updated in place",
        facts.builder,
        facts.version,
        request.plan_path.name,
        facts.target,
        facts.seconds,
        human_bytes(facts.bytes),
        facts.cache_updates,
    )
    return Engine(
        builder=facts.builder,
        version=facts.version,
        target=facts.target,
        file=request.plan_path.name,
        dtype=facts.dtype,  # type: ignore[arg-type]  # validated by the record
        profiles=facts.profiles,
    )
