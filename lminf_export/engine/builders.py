"""From a prepared graph to an engine's plan; one module for each builder.

Importing this imports no TensorRT. The build itself runs in a child process
(`lminf_export.engine.child`), because a builder may crash and keeps memory for itself.
"""

from __future__ import annotations

import importlib.util
import logging
from types import MappingProxyType, ModuleType

from lminf_export.bundle.files import file_sha256, human_bytes
from lminf_export.bundle.records import Engine, Plugin
from lminf_export.engine import tensorrt, tensorrt_rtx
from lminf_export.engine.common import (
    LOGGER_NAME,
    EngineFacts,
    EngineRequest,
    Profile,
)
from lminf_export.engine.options import ELSEWHERE, EngineOptions
from lminf_export.errors import EngineError
from lminf_export.progress import Progress, silent

# The graph TensorRT builds from, beside the exported one.
ENGINE_GRAPH_NAME = "engine.onnx"

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
        name: "tensorrt", "tensorrt-rtx", or "none" for a build on another machine; None takes
            the one that is installed.

    Raises:
        EngineError: an unknown name, a builder that is not installed, or no name where the
            choice is open.
    """
    available = available_builders()
    if name == ELSEWHERE:
        return name
    if name is not None:
        if name not in _BUILDERS:
            known = ", ".join((*_BUILDERS, ELSEWHERE))
            raise EngineError(f"builder={name!r}: must be one of {known}")
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


def check_options(builder: str, options: EngineOptions) -> None:
    """Refuse settings that a builder does not have.

    Raises:
        EngineError: naming the setting.
    """
    if builder == ELSEWHERE or _BUILDERS[builder].TAKES_PLUGIN:
        return
    useless = [name for name in options.asked_for if name != "plugin" or not options.without_plugin]
    if useless:
        raise EngineError(
            f"{useless[0]}: {builder} has no such setting; it is for --builder tensorrt"
        )


def uses_plugin(builder: str, options: EngineOptions) -> bool:
    """Say whether an engine's attention runs in the plugin."""
    return not options.without_plugin and (
        builder == ELSEWHERE or bool(_BUILDERS[builder].TAKES_PLUGIN)
    )


def has_recipe(builder: str) -> bool:
    """Say whether a builder's plans can be made from files of the bundle by `trtexec` too."""
    return builder == ELSEWHERE or bool(_BUILDERS[builder].TAKES_PLUGIN)


def require_machine(builder: str) -> None:
    """Check that a builder can build here, before anything else takes its time.

    Raises:
        EngineError: saying what is missing.
    """
    if builder != ELSEWHERE:
        _BUILDERS[builder].require_machine()


def build_engine(builder: str, request: EngineRequest, progress: Progress = silent) -> Engine:
    """Build a plan and return the manifest's record of it.

    Args:
        builder: from `select_builder`.
        request: what to build, and the file to write.
        progress: receives the phase that runs.

    Raises:
        EngineError: naming what the builder refused; no plan is left behind.
    """
    facts: EngineFacts = _BUILDERS[builder].build(request, progress)
    logger.info(
        "%s %s built %s (%s) in %.1f s: %s, %d caches %s",
        facts.builder,
        facts.version,
        request.plan_path.name,
        facts.target,
        facts.seconds,
        human_bytes(facts.bytes),
        facts.cache_updates,
        _updates_in_words(request),
    )
    return engine_record(
        request,
        builder=facts.builder,
        version=facts.version,
        target=facts.target,
        profiles=facts.profiles,
    )


def _updates_in_words(request: EngineRequest) -> str:
    """TensorRT's own updates are in place by definition; a plugin's only as far as it is asked."""
    if not request.with_plugin:
        return "updated in place"
    if request.options.declares_aliases:
        return "declared as updated in place, which the first step will check"
    return "to be bound in place, which the first step will check"


def engine_record(
    request: EngineRequest,
    *,
    builder: str,
    version: str,
    target: str,
    profiles: tuple[Profile, ...],
) -> Engine:
    """Return the manifest's record of a plan; the plugin's digest is computed here."""
    plugin = None
    if request.with_plugin:
        assert request.plugin_path is not None, "a plan with a plugin has a library"
        plugin = Plugin(
            file=request.plugin_path.name,
            sha256=file_sha256(request.plugin_path),
            embedded=request.options.embed_plugin,
        )
    return Engine(
        builder=builder,
        version=version,
        target=target,
        file=request.plan_path.name,
        dtype=request.contract.dtype,
        profiles=profiles,
        plugin=plugin,
        # The plugin writes circularly; TensorRT's own cache update knows no such mode.
        ring_writes="circular" if request.with_plugin else "linear",
        sinks_in_place=request.with_plugin,
        options=request.options.described(),
    )
