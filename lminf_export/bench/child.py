"""A fresh process that loads a bundle and makes one token: `python -m lminf_export.bench.child`.

Prints one JSON object. It imports only what a program that generates text imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lminf_export.bench.report import FirstToken, Memory
from lminf_export.errors import SessionError

_STEPS = 3


def fresh_process(
    bundle: Path, provider: str, threads: int | None, kernels: str
) -> tuple[FirstToken, Memory]:
    """Start the child and read what it measured.

    Raises:
        SessionError: the bundle does not run; in the child's words.
    """
    command = [sys.executable, "-m", __name__, str(bundle), provider, str(threads or 0), kernels]
    start = time.time()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise SessionError(f"a fresh process could not run {bundle}: {lines[-1]}")
    found = json.loads(done.stdout)
    begun = found.pop("first_token_at") - start
    return FirstToken(process=begun, **found["seconds"]), Memory(**found["memory"])


def main() -> None:
    """Measure this very process."""
    start = time.perf_counter()
    from lminf_export.runtime.load import load

    bundle, provider, threads, kernels = *sys.argv[1:3], int(sys.argv[3]) or None, sys.argv[4]
    imported = time.perf_counter()
    before = process_memory()["anonymous"]
    model = load(bundle, provider=provider, threads=threads, kernels=kernels)  # type: ignore[arg-type]
    loaded = time.perf_counter()
    state = model.new_state()
    model.forward([[0]], state, logits="last")
    done, first_token_at = time.perf_counter(), time.time()
    model.session.stand_at(state, 10**6)
    for _ in range(_STEPS):
        model.forward([[0]], state, logits="last")
    memory = {"imports_anonymous": before, **process_memory()}
    seconds = {
        "imports": imported - start,
        "load": loaded - imported,
        "step": done - loaded,
        "map_weights": _read_seconds(model.bundle.path, model.bundle.manifest.files_of("weights")),
    }
    print(json.dumps({"seconds": seconds, "memory": memory, "first_token_at": first_token_at}))


def process_memory() -> dict[str, int]:
    """Return this process's anonymous and total resident bytes."""
    import psutil

    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux: unique memory stands for anonymous memory
        info = psutil.Process().memory_full_info()
        return {"anonymous": info.uss, "total": info.rss}
    table = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return {key: int(table[name][0]) * 1024 for key, name in _FIELDS.items()}


_FIELDS = {"anonymous": "RssAnon", "total": "VmRSS"}


def _read_seconds(folder: Path, names: list[str]) -> float:
    """Read files once, block by block; return how long that takes."""
    buffer: Any = bytearray(2**22)
    start = time.perf_counter()
    for name in names:
        with open(folder / name, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
