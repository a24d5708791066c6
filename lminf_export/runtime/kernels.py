"""Which code computes `lminf::LambdaAttention` in onnxruntime: a library's kernel, or the body.

The library `liblminf_ort.so` is built and installed with the package where a C++ compiler is at
hand. A kernel registered under the operator's name takes its nodes; without one onnxruntime runs
the function body the graph carries.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from lminf_export.errors import SessionError

INSTALLED = Path(__file__).parents[1] / "lib" / "liblminf_ort.so"
OPERATOR_VERSION = 1
AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class KernelLibrary:
    """A loaded library of kernels.

    Attributes:
        path: its file.
        instruction_set: what its CPU kernel runs on here, such as "avx512".
        providers: onnxruntime's short provider names it has kernels for.
    """

    path: Path
    instruction_set: str
    providers: tuple[str, ...]

    @property
    def description(self) -> str:
        """One word group for people."""
        return f"{self.path.name} ({self.instruction_set})"


def find_kernels(kernels: str | Path, provider: str) -> KernelLibrary | None:
    """Return the library to register, or None for the function body.

    Args:
        kernels: "auto" takes the library installed with the package, if there is one and it has
            a kernel for the provider; "none" takes the function body; anything else is the path
            of a library. A library is code: name only one you trust.
        provider: "cpu" or "cuda".

    Raises:
        SessionError: the library is missing, damaged, not one of ours, of another version of the
            operator, or without a kernel for the provider.
    """
    if str(kernels) == NONE:
        return None
    if str(kernels) == AUTO:
        if not INSTALLED.is_file():
            return None
        found = open_library(INSTALLED)
        return found if provider in found.providers else None
    found = open_library(Path(kernels))
    if provider not in found.providers:
        raise SessionError(
            f"kernel library {found.path} has kernels for {', '.join(found.providers)}, not for "
            f"provider {provider!r}; use kernels='none' to run the function body"
        )
    return found


def open_library(path: Path) -> KernelLibrary:
    """Load a library and ask what it is.

    Raises:
        SessionError: see `find_kernels`.
    """
    if not path.is_file():
        raise SessionError(
            f"kernel library {path} does not exist; give 'auto', 'none' or a library's path"
        )
    _require_whole(path)
    try:
        library = ctypes.CDLL(str(path.resolve()))
        version = library.lminfOperatorVersion()
        texts = []
        for function in (library.lminfInstructionSet, library.lminfProviders):
            function.restype = ctypes.c_char_p
            texts.append(function().decode())
    except (OSError, AttributeError) as error:
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
    return KernelLibrary(path, texts[0], tuple(texts[1].split()))


def _require_whole(path: Path) -> None:
    """Refuse a file that ends early: mapping it could kill the process."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[:4] != b"\x7fELF" or len(head) < 64 or head[4:6] != b"\x02\x01":
        return  # no 64-bit little-endian ELF file; the loader says what it thinks of it
    table = int.from_bytes(head[40:48], "little")  # the section table stands at the end
    entries = int.from_bytes(head[60:62], "little") * int.from_bytes(head[58:60], "little")
    size = path.stat().st_size
    if size < table + entries:
        raise SessionError(
            f"kernel library {path} is cut short ({size} bytes, expected {table + entries}); "
            "install lminf-export again, or use kernels='none'"
        )
