"""Which code computes `lminf::LambdaAttention` in onnxruntime: a library's kernel, or the body.

The same operator over rings of int8 has kernels of its own, on fewer providers.

The library `liblminf_ort.so` (`.dylib` on macOS) is built and installed with the package where a
C++ compiler is at hand. A kernel registered under the operator's name takes its nodes; without one
onnxruntime runs the function body the graph carries.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from lminf_export.disk import is_file, require_path
from lminf_export.errors import SessionError

logger = logging.getLogger(__name__)

_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"  # setup.py agrees
INSTALLED = Path(__file__).parents[1] / "lib" / f"liblminf_ort{_SUFFIX}"
OPERATOR_VERSION = 1
AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class KernelLibrary:
    """A loaded library of kernels.

    Attributes:
        path: its file.
        instruction_set: what its CPU kernel runs on here, such as "avx512".
        providers: onnxruntime's short provider names it has kernels for.
        int8_cache_providers: those with kernels for rings of int8.
        cuda_head_dims: head dimensions that its kernels for "cuda" take.
    """

    path: Path
    instruction_set: str
    providers: tuple[str, ...]
    int8_cache_providers: tuple[str, ...]
    cuda_head_dims: tuple[int, ...] = ()

    @property
    def description(self) -> str:
        """File name and instruction set, for logs and reports."""
        return f"{self.path.name} ({self.instruction_set})"


def find_kernels(
    kernels: str | Path,
    provider: str,
    kv_cache_dtype: str | None = None,
    head_dims: Set[int] = frozenset(),
) -> KernelLibrary | None:
    """Return the library to register, or None for the function body.

    Args:
        kernels: "auto" takes the library installed with the package, if there is one and it has
            kernels for the provider and the head dimensions; "none" takes the function body;
            anything else is the path of a library. A library is code: name only one you trust.
        provider: "cpu" or "cuda".
        kv_cache_dtype: "int8" for rings of int8; None for rings in the model's type.
        head_dims: D of all layers.

    Raises:
        SessionError: the library is missing, damaged, not one of ours, of another version of the
            operator, or without a kernel for the provider or a head dimension.
    """
    require_path("kernels", kernels, SessionError)
    if str(kernels) == NONE:
        return None
    if str(kernels) == AUTO:
        if not is_file(INSTALLED):
            return None
        found = open_library(INSTALLED)
        if provider not in _providers(found, kv_cache_dtype):
            return None
        if missing := _missing_head_dims(found, provider, head_dims):
            logger.warning("%s; the function body runs instead", missing)
            return None
        return found
    found = open_library(Path(kernels))
    providers = _providers(found, kv_cache_dtype)
    if provider not in providers:
        caches = "" if kv_cache_dtype is None else f" and {kv_cache_dtype} caches"
        raise SessionError(
            f"kernel library {found.path} has kernels for {', '.join(providers)}, not for "
            f"provider {provider!r}{caches}; use kernels='none' to run the function body"
        )
    if missing := _missing_head_dims(found, provider, head_dims):
        raise SessionError(f"{missing}; use kernels='none' to run the function body")
    return found


def _missing_head_dims(library: KernelLibrary, provider: str, head_dims: Set[int]) -> str:
    """Return what the library lacks for these head dimensions, or an empty text."""
    missing = sorted(head_dims - set(library.cuda_head_dims)) if provider == "cuda" else []
    if not missing:
        return ""
    return (
        f"kernel library {library.path} has no CUDA kernels for head_dim "
        f"{', '.join(map(str, missing))} (it takes {', '.join(map(str, library.cuda_head_dims))})"
    )


def _providers(library: KernelLibrary, kv_cache_dtype: str | None) -> tuple[str, ...]:
    return library.providers if kv_cache_dtype is None else library.int8_cache_providers


def open_library(path: Path) -> KernelLibrary:
    """Load a library and ask what it is.

    Raises:
        SessionError: see `find_kernels`.
    """
    if not is_file(path):
        raise SessionError(
            f"kernel library {path} does not exist; give 'auto', 'none' or a library's path"
        )
    _require_whole(path)
    try:
        library = ctypes.CDLL(str(path.resolve()))
        version = library.lminfOperatorVersion()
        texts = []
        for function in (
            library.lminfInstructionSet,
            library.lminfProviders,
            library.lminfInt8CacheProviders,
            library.lminfCudaHeadDims,
        ):
            function.restype = ctypes.c_char_p
            texts.append(function().decode())
    except (OSError, AttributeError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise SessionError(
            f"{path} is not a kernel library of lminf-export, or is damaged ({reason}); "
            "install lminf-export again, or use kernels='none'"
        ) from error
    if version != OPERATOR_VERSION:
        raise SessionError(
            f"kernel library {path} implements version {version} of LambdaAttention, this "
            f"lminf-export needs {OPERATOR_VERSION}; install lminf-export again"
        )
    instructions, providers, int8_cache_providers, head_dims = texts
    return KernelLibrary(
        path,
        instructions,
        tuple(providers.split()),
        tuple(int8_cache_providers.split()),
        tuple(map(int, head_dims.split())),
    )


def _require_whole(path: Path) -> None:
    """Refuse a file that ends early: mapping it could kill the process."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[:4] != b"\x7fELF" or len(head) < 64 or head[4:6] != b"\x02\x01":
        return  # no 64-bit little-endian ELF file; the loader reports the error
    table = int.from_bytes(head[40:48], "little")  # the section table stands at the end
    entries = int.from_bytes(head[60:62], "little") * int.from_bytes(head[58:60], "little")
    size = path.stat().st_size
    if size < table + entries:
        raise SessionError(
            f"kernel library {path} is cut short ({size} bytes, expected {table + entries}); "
            "install lminf-export again, or use kernels='none'"
        )
