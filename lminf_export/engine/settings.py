"""Set a user's settings in an IBuilderConfig; every member is looked up by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lminf_export.engine.common import EngineRequest
from lminf_export.engine.options import EngineOptions
from lminf_export.errors import EngineError

_ALIASES = "ALIASED_PLUGIN_IO_10_03"


def require_aliases(trt: Any) -> None:
    """Refuse releases whose plugins cannot update a cache in place (before 10.3).

    Raises:
        EngineError: naming the release.
    """
    if _aliases(trt) is None:
        raise EngineError(
            f"{trt.__name__} {trt.__version__} has no plugins that update a cache in place; "
            "TensorRT 10.3 or later is required"
        )


def _aliases(trt: Any) -> Any:
    features = getattr(trt, "PreviewFeature", None)
    return features.__members__.get(_ALIASES) if features is not None else None


def apply(trt: Any, config: Any, request: EngineRequest) -> None:
    """Set the request's options; all others keep the release's defaults."""
    options = request.options
    if request.with_plugin:
        if options.declares_aliases:
            config.set_preview_feature(_aliases(trt), True)
        if options.embed_plugin and request.plugin_path is not None:
            config.plugins_to_serialize = [str(request.plugin_path.resolve())]
    if options.workspace is not None:
        pool = trt.MemoryPoolType.__members__["WORKSPACE"]
        config.set_memory_pool_limit(pool, int(options.workspace))
    if options.builder_optimization_level is not None:
        config.builder_optimization_level = options.builder_optimization_level


def open_timing_cache(config: Any, options: EngineOptions, errors: list[str]) -> Any:
    """Attach the timing cache of a file, an empty one if there is none yet.

    Args:
        config: the IBuilderConfig.
        options: `timing_cache` names the file; None for none.
        errors: the library's error messages.

    Returns:
        The ITimingCache, which must live until the engine is built; None without a file.

    Raises:
        EngineError: the file cannot be read, or is of another GPU or release.
    """
    if options.timing_cache is None:
        return None
    path = Path(options.timing_cache)
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise EngineError(f"cannot read the timing cache {path}: {error.strerror}") from error
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        reason = f" ({errors[-1].strip().splitlines()[0]})" if errors else ""
        raise EngineError(
            f"{path} is not a timing cache of this GPU and this TensorRT{reason}; remove it, or "
            "name another file"
        )
    return cache


def save_timing_cache(cache: Any, options: EngineOptions) -> None:
    """Write a timing cache back to its file, whole or not at all.

    Raises:
        EngineError: it cannot be written.
    """
    if cache is None or options.timing_cache is None:
        return
    path = Path(options.timing_cache)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(memoryview(cache.serialize()))
        os.replace(partial, path)
    except OSError as error:
        raise EngineError(f"cannot write the timing cache {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
