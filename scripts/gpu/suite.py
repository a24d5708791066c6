"""The settings and state of a step: the device, the kernels, and where a result grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.gpu.cuda_device import CudaDevice
from scripts.gpu.emulated_device import TimedEmulation
from scripts.gpu.kernel_library import KernelLibrary

KERNELS = Path("lambda_attention") / "liblminf_kernels.so"  # in the build folder


class SkipStep(Exception):
    """The machine lacks what a step needs; the message names it."""


class DeviceLost(RuntimeError):
    """A kernel failed in a way that stays in the process: nothing more can be run in it."""


def _forgotten(_result: dict[str, Any]) -> None:
    return None


@dataclass
class Suite:
    """Settings and state of a step.

    Attributes:
        device: where kernels run.
        build: folder of the CMake build.
        library: the kernels, once they are built.
        quick: fewer streams, one size of timing: for the sanitizer and for tests.
        emulate: the device is the block emulation.
        keep: takes what a step has found so far, in case it does not end.
    """

    device: Any
    build: Path
    library: KernelLibrary | None = None
    quick: bool = False
    emulate: bool = False
    keep: Callable[[dict[str, Any]], None] = _forgotten

    def kernels(self) -> KernelLibrary:
        """Return the built library.

        Raises:
            SkipStep: it was not built.
        """
        if self.library is None:
            raise SkipStep("the kernels were not built")
        return self.library

    def runs_hopper(self) -> bool:
        """Whether device and library have the kernel of compute capability 9.0."""
        return bool(self.device.hopper) and self.kernels().has_hopper

    def check_device(self) -> None:
        """Ask the device whether it still answers.

        Raises:
            DeviceLost: it does not.
        """
        try:
            self.device.synchronize()
        except RuntimeError as error:
            raise DeviceLost(in_words(error)) from error


def suite_of(
    build: Path,
    library: Path | None,
    *,
    quick: bool,
    emulate: bool,
    keep: Callable[[dict[str, Any]], None] = _forgotten,
) -> Suite:
    """Describe a run: this machine's GPU or the emulation, with the kernels that were built.

    Raises:
        SkipStep: there is no GPU.
    """
    if not emulate and not torch.cuda.is_available():
        raise SkipStep("torch sees no GPU here; --dry-run or --emulate need none")
    path = library or build / KERNELS
    return Suite(
        device=TimedEmulation() if emulate else CudaDevice.current(),
        build=build,
        library=KernelLibrary(path) if path.exists() else None,
        quick=quick,
        emulate=emulate,
        keep=keep,
    )


def in_words(error: BaseException) -> str:
    """Return an error's type and the first line of what it says, if it says anything."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
