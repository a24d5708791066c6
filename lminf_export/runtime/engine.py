"""Loads TensorRT's libraries, the plugin and the plan, and checks them before the first step.

Every check that needs no library comes first; one that fails is one clear line.
"""

from __future__ import annotations

import importlib
import logging
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lminf_export.bundle.manifest import Manifest
from lminf_export.bundle.records import Engine, Tensor
from lminf_export.bundle.tables import describe
from lminf_export.errors import SessionError
from lminf_export.operator import bindings
from lminf_export.runtime.gpu import Gpu
from lminf_export.runtime.plugin_cuda import driver_problem
from lminf_export.tensors.dtypes import ELEMENT_TYPES

# How the plugin's messages begin, in a library's log.
PLUGIN_PREFIX = "LambdaAttention: "
INSTEAD = "run the bundle's model.onnx with onnxruntime instead"

# builder → Python package of its runtime.
_PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_DTYPES = {row.tensorrt: row.name for row in ELEMENT_TYPES.values() if row.tensorrt}
# Major compute capabilities that TensorRT for RTX has no kernels for, though they are above 8.0.
_NOT_RTX = (9, 10)
_CREATOR = ("LambdaAttention", "1", "lminf")


@dataclass(frozen=True)
class Libraries:
    """The Python modules that a session uses; tests pass doubles.

    Attributes:
        trt: `tensorrt` or `tensorrt_rtx`.
        cudart: `cuda.bindings.runtime`.
    """

    trt: Any
    cudart: Any


def message_log(trt: Any, target: logging.Logger) -> Any:
    """Return an ILogger that passes a library's messages on and remembers its errors.

    Errors reach the user as an exception, so in the log they are only information.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        target: where the messages go.
    """
    severity = trt.ILogger.Severity
    errors = (severity.ERROR, severity.INTERNAL_ERROR)
    levels = dict.fromkeys((*errors, severity.WARNING), logging.INFO)
    levels[severity.INFO] = logging.DEBUG

    class Messages(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in errors:
                self.errors.append(message)
            if level in levels:
                target.log(levels[level], "%s: %s", level.name.lower(), message.strip())

    return Messages()


def load_plugin(registry: Any, path: Path, errors: Sequence[str]) -> Any:
    """Load the plugin's library into a registry; a plan with a plugin is nothing without it.

    Args:
        registry: an IPluginRegistry of a builder or a runtime.
        path: the library.
        errors: what TensorRT logs.

    Returns:
        The library's handle.

    Raises:
        SessionError: TensorRT does not take the library.
    """
    # An unloadable library is None here, and the reason only in the log.
    handle = registry.load_library(str(path.resolve()))
    if handle is None or registry.get_creator(*_CREATOR) is None:
        raise SessionError(
            f"TensorRT cannot load the plugin {path}: {reason(errors)}; it must be built for "
            "this operating system with TensorRT's headers (docs/engines.md)"
        )
    return handle


def load_libraries(engine: Engine) -> Libraries:
    """Import what the manifest's builder needs.

    Raises:
        SessionError: an unknown builder, or a package that does not load.
    """
    package = _PACKAGES.get(engine.builder)
    if package is None:
        raise SessionError(
            f"this plan is of builder {engine.builder!r}; this lminf-export knows "
            f"{', '.join(_PACKAGES)}"
        )
    return Libraries(_import(package, engine.builder), _import("cuda.bindings.runtime", "cuda"))


def _import(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        # A missing shared library is an OSError or an ImportError, by release.
        package = {"cuda": "cuda-python"}.get(what, what)
        raise SessionError(
            f"this plan needs the Python package {package}, which does not load ({error}); "
            f"pip install {package}, or {INSTEAD}"
        ) from error


def check_target(engine: Engine, gpu: Gpu) -> None:
    """Compare the plan's target, such as "sm_89", "sm_80+" or "sm_75,sm_86", with the GPU."""
    own = gpu.compute_capability
    if engine.builder == "tensorrt-rtx" and own[0] in _NOT_RTX:
        raise SessionError(
            f"TensorRT for RTX does not run on GPUs of compute capability 9.x and 10.x, and this "
            f"machine's ({gpu.name}) is {gpu.target}; build the plan with --builder tensorrt on "
            f"this GPU, or {INSTEAD}"
        )
    for target in engine.target.split(","):
        number = target.removeprefix("sm_").removesuffix("+")
        if not number.isdigit():
            continue
        wanted = divmod(int(number), 10)
        if own == wanted or (target.endswith("+") and own >= wanted):
            return
    raise SessionError(
        f"this plan is for {engine.target}, this machine's GPU ({gpu.name}) is {gpu.target}; "
        f"build it for this GPU, or {INSTEAD}"
    )


def check_driver(plugin: Path | None, gpu: Gpu) -> None:
    """Refuse a plugin whose CUDA runtime needs a newer driver, before it is loaded.

    Args:
        plugin: the library; None if there is none beside the plan.
        gpu: the machine's.

    Raises:
        SessionError: with both versions and what to do.
    """
    problem = driver_problem(plugin, gpu) if plugin is not None else None
    if problem is not None:
        raise SessionError(f"{problem}, or {INSTEAD}")


def check_version(engine: Engine, trt: Any) -> None:
    """Refuse a plan of another release; plans do not move between them."""
    if trt.__version__ != engine.version:
        raise SessionError(
            f"this plan was built by {engine.builder} {engine.version}, installed is "
            f"{trt.__version__}; plans do not move between versions: install that version or "
            "build the plan again"
        )


def deserialize(runtime: Any, path: Path, messages: Any) -> Any:
    """Return the engine of a plan the manifest vouches for."""
    # Mapped, so that the plan is not in memory twice.
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
    ):
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise SessionError(f"{path} cannot be loaded: {reason(messages.errors)}; {INSTEAD}")
    return engine


def check_table(trt: Any, engine: Any, manifest: Manifest, path: Path) -> None:
    """Compare the engine's tensors with the manifest, rings at their full size."""
    sizes = _sizes(manifest)
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    modes = (
        (trt.TensorIOMode.INPUT, manifest.inputs),
        (trt.TensorIOMode.OUTPUT, manifest.outputs),
    )
    for mode, expected in modes:
        found = [name for name in names if engine.get_tensor_mode(name) == mode]
        if sorted(found) != sorted(row.name for row in expected):
            raise SessionError(f"{path} has other tensors than the manifest; build it again")
        for row in expected:
            shape = tuple(engine.get_tensor_shape(row.name))
            dtype = engine.get_tensor_dtype(row.name).name
            fits = len(shape) == len(row.shape) and all(
                found in (sizes[dim] if isinstance(dim, str) else (dim,))
                for found, dim in zip(shape, row.shape, strict=True)
            )
            if not fits or _DTYPES.get(dtype) != row.dtype:
                other = Tensor(name=row.name, dtype=_DTYPES.get(dtype, dtype), shape=shape)
                raise SessionError(
                    f"{path} has {describe(other)}, the manifest says {describe(row)}; "
                    "build it again"
                )


def _sizes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Symbol → what an engine may have there: −1 while it is open, or its only size."""
    assert manifest.engine is not None
    sizes: dict[str, tuple[int, ...]] = {
        symbol: (size,) for symbol, size in manifest.contract.ring_sizes().items()
    }
    for symbol in (bindings.BATCH, bindings.SEQUENCE, bindings.NUM_LOGITS):
        asked = {size for profile in manifest.engine.profiles for size in profile[symbol]}
        sizes[symbol] = (-1, *asked) if len(asked) == 1 else (-1,)
    return sizes


def check_aliases(engine: Any, manifest: Manifest, path: Path) -> None:
    """Every ring must be updated in place: one address serves past and present."""
    for past, present in manifest.contract.ring_updates().items():
        if engine.get_aliased_input_tensor(present) != past:
            raise SessionError(f"{path} does not update {past} in place; build it again")


def reason(errors: Sequence[str]) -> str:
    """Return the first line of the first error a library has logged."""
    return errors[0].strip().splitlines()[0] if errors and errors[0].strip() else "no reason given"
