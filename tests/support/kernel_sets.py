"""The installed CPU kernels on one instruction set, for as long as a test takes."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lminf_export.runtime.kernels import INSTALLED, open_library

SETS = ("portable", "avx2", "avx512")
# Products of integers have kernels of their own where bytes are multiplied and summed at once.
INTEGER_SETS = (*SETS, "avx512vnni")
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
needs_kernels = pytest.mark.skipif(
    not HAS_COMPILER and not INSTALLED.is_file(), reason="no C++ compiler, no kernels were built"
)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Make the library compute on an instruction set; skip the test where that cannot be."""
    if not HAS_COMPILER and not INSTALLED.is_file():
        pytest.skip("no C++ compiler, no kernels were built")
    library = ctypes.CDLL(str(INSTALLED))
    before = open_library(INSTALLED).instruction_set
    if not library.lminfUseInstructionSet(name.encode()):
        pytest.skip(f"this processor has no {name}")
    yield
    assert library.lminfUseInstructionSet(before.encode())


@contextmanager
def asking_for_once(once: bool) -> Iterator[None]:
    """Make the library ask for weights as data used once, or like any other data."""
    library = ctypes.CDLL(str(INSTALLED))
    before = library.lminfAsksForOnce()
    library.lminfAskForOnce(once)
    try:
        yield
    finally:
        library.lminfAskForOnce(before)


def available_sets(names: tuple[str, ...]) -> list[str]:
    """Those of some instruction sets that this processor has."""
    library = ctypes.CDLL(str(INSTALLED))
    before = open_library(INSTALLED).instruction_set
    found = [name for name in names if library.lminfUseInstructionSet(name.encode())]
    assert library.lminfUseInstructionSet(before.encode())
    return found
