"""The header of a result: which bundle, on which device, with which package versions."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lminf_export.bundle.versions import package_version

if TYPE_CHECKING:
    from lminf_export.bundle.manifest import Manifest

PACKAGES = ("lminf-export", "onnxruntime", "onnx", "torch", "transformers", "numpy")


def environment() -> dict[str, Any]:
    """Return device, Python and package versions of this run."""
    return {
        "device": cpu_name(),
        "cores": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
    }


def describe_bundle(manifest: Manifest) -> dict[str, Any]:
    """Return what a result says about the bundle it was measured on."""
    return {
        "model": manifest.source.name,
        "bundle_sha256": manifest.manifest_sha256,
        "training_length": manifest.training_length,
        "lambda_config": manifest.lambda_config.model_dump(),
        "dtype": manifest.dtype,
        "kv_cache_dtype": manifest.kv_cache_dtype,
    }


def cpu_name() -> str:
    """Return the processor's name where Linux gives it, else the machine type."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
