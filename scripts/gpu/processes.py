"""One step in a process of its own, ended at its limit; what it had found by then is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent.parent
SHOWN = 2000  # characters of a message


def run_limited(command: list[str], limit: float, output: IO[str] | None = None) -> int | None:
    """Run a command in the repository's root and return its exit status, None after the limit.

    Args:
        command: its words.
        limit: seconds, after which it is ended with everything that it has started.
        output: what it prints goes there; None: to where this process prints.
    """
    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_step(name: str, limit: float, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Run `python -m scripts.gpu.one_step NAME` and return its result.

    Args:
        name: of the step.
        limit: seconds.
        folder: where the step writes what it has found so far.
        arguments: further ones of the command.

    Returns:
        The step's result with its `status` ("ok", "failed", "not run") and `seconds`; a process
        that was ended or died left what it had written, and is "failed" with the `reason`.
    """
    found = folder / f"step-{name}.json"
    found.unlink(missing_ok=True)
    command = [sys.executable, "-m", "scripts.gpu.one_step", name, "--out", str(found), *arguments]
    start = time.monotonic()
    log = folder / f"step-{name}.log"
    with log.open("w", encoding="utf-8") as output:
        status = run_limited(command, limit, output)
    result = json.loads(found.read_text(encoding="utf-8")) if found.exists() else {}
    found.unlink(missing_ok=True)
    if status is None:
        result |= {"status": "failed", "reason": f"ended after {limit:.0f} s"}
    elif status != 0 or "status" not in result:
        said = log.read_text(encoding="utf-8", errors="replace").strip()
        result |= {"status": "failed", "reason": f"ended with status {status}: {said[-SHOWN:]}"}
    return {**result, "seconds": round(time.monotonic() - start, 1)}
