"""Find the plugin's library, and check whether a file can be it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lminf_export
from lminf_export.engine.options import NO_PLUGIN, EngineOptions
from lminf_export.errors import EngineError
from lminf_export.operator import contract
from lminf_export.operator.bindings import LayerSpec
from lminf_export.runtime.gpu import Gpu, find_gpu
from lminf_export.runtime.plugin_cuda import driver_problem

PLUGIN_FILE = "liblminf_tensorrt.so"

# What the kernels are compiled for; the plugin itself refuses the rest.
HEAD_DIMS = (32, 64, 80, 96, 128, 256)

_ELF = b"\x7fELF"
# The symbol that TensorRT looks up in a library of plugins, and the name of our first creator.
_MARKS = (b"getCreators", contract.OP_TYPE.encode())
_HOW = (
    "build it with cmake (docs/engines.md) or name it with --plugin PATH; "
    f"--plugin {NO_PLUGIN} builds an engine of standard operators"
)


def default_places() -> tuple[Path, ...]:
    """Return where the library is looked for: installed with the package, or built beside it."""
    package = Path(next(iter(lminf_export.__path__)))
    return (
        package / "lib" / PLUGIN_FILE,
        package.parent / "build" / "plugins" / PLUGIN_FILE,
    )


def find_plugin(
    options: EngineOptions, *, required: bool = True, int8_cache: bool = False
) -> Path | None:
    """Return the library to build with, or None for an engine of standard operators.

    Args:
        options: whose `plugin` names a file, or "none", or leaves the choice.
        required: the engine is built here: raise an error if no library was named and none is
            found, or if this machine's driver is too old for it.
        int8_cache: the rings hold int8, which a library of before has no creator for.

    Raises:
        EngineError: no library was found, the named file is not one, or it needs a newer driver.
    """
    if options.without_plugin:
        return None
    found = Path(options.plugin) if options.plugin is not None else _installed(required)
    if found is not None:
        check_plugin(found, int8_cache=int8_cache)
        if required:
            _require_driver(found)
    return found


def _installed(required: bool) -> Path | None:
    found = next((path for path in default_places() if path.is_file()), None)
    if found is None:
        if not required:
            return None
        places = " or ".join(str(path) for path in default_places())
        raise EngineError(f"the plugin's library is not at {places}; {_HOW}")
    return found


def _require_driver(path: Path) -> None:
    """Where an engine is built here, its kernels run here: the driver must be new enough."""
    gpu = find_gpu()
    problem = driver_problem(path, gpu) if isinstance(gpu, Gpu) else None
    if problem is not None:
        raise EngineError(problem)


def check_plugin(path: Path, *, int8_cache: bool = False) -> None:
    """Check that a file looks like the plugin's library, without loading it.

    Args:
        path: of the file.
        int8_cache: it must have the plugin over rings of int8, too.

    Raises:
        EngineError: it cannot be read, or is something else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read the plugin {path}: {error.strerror}; {_HOW}") from None
    if not content.startswith(_ELF) or not all(mark in content for mark in _MARKS):
        raise EngineError(f"{path} is not the library of the LambdaAttention plugin; {_HOW}")
    if int8_cache and contract.INT8_CACHE_OP_TYPE.encode() not in content:
        raise EngineError(
            f"{path} was built before its plugin took rings of int8; build it again with cmake "
            "(docs/engines.md), or leave --kv-cache-dtype out"
        )


def head_dim_problem(layers: Sequence[LayerSpec]) -> str | None:
    """Return which layers the plugin's kernels cannot run, None if they run all."""
    odd = sorted({layer.head_dim for layer in layers} - set(HEAD_DIMS))
    if not odd:
        return None
    return (
        f"head_dim {', '.join(map(str, odd))}: the plugin's kernels take "
        f"{', '.join(map(str, HEAD_DIMS))}; --plugin {NO_PLUGIN} builds an engine of standard "
        "operators"
    )
