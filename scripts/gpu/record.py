"""The suite's results as a file that grows with every step, and which of them still hold."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

# What a result follows from: the kernels, the specification and the suite itself.
SOURCES = ("plugins", "lminf_export/operator", "scripts/gpu", "benchmarks/support/operator_case.py")
_KINDS = {".cu", ".cuh", ".inl", ".h", ".cpp", ".cc", ".txt", ".py", ".map"}


def file_name(gpu: str) -> str:
    """Return the name of a GPU's results: gpu-nvidia-h200.json."""
    return f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-').lower()}.json"


def read(path: Path) -> dict[str, Any]:
    """Return the results in a file; none if there is no such file."""
    if not path.exists():
        return {"steps": {}}
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def write(path: Path, result: dict[str, Any]) -> None:
    """Write results beside their place and put them there, so that a cut leaves the last ones."""
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def digest(root: Path) -> str:
    """Return 12 hexadecimal digits of everything that a result follows from."""
    found = hashlib.sha256()
    for source in SOURCES:
        place = root / source
        paths = [place] if place.is_file() else sorted(place.rglob("*"))
        for path in paths:
            if path.is_file() and path.suffix in _KINDS:
                found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def holds(step: dict[str, Any] | None, sources: str, *, quick: bool) -> bool:
    """Whether a recorded step was right with these sources, and as thorough as asked for."""
    if step is None or step["status"] != "ok" or step["sources"] != sources:
        return False
    return quick or not step["quick"]
