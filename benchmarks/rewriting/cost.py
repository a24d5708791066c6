"""The cost of one rewrite, in a fresh process: seconds, and anonymous memory over its start."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.support.memory import anonymous_bytes

_CODE = """
import sys
import lminf_export.rewriting.run
print("ready", flush=True)
sys.stdin.readline()
lminf_export.rewriting.run.rewrite(
    sys.argv[1], sys.argv[2], window_size=int(sys.argv[3]), num_sink_tokens=int(sys.argv[4])
)
"""


def rewrite_in_child(model: Path, out: Path, window: int, sinks: int) -> dict[str, Any]:
    """Rewrite a model, its check included; return what that took.

    Memory is RssAnon, sampled every 5 ms; it is counted over the interpreter with its imports.
    """
    if out.exists():
        shutil.rmtree(out)
    begun = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", _CODE, str(model), str(out), str(window), str(sinks)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    if not child.stdout.readline():
        raise SystemExit(f"the rewrite's process ended with {child.wait()} before it began")
    imports, ready = anonymous_bytes(child.pid), time.perf_counter()
    child.stdin.write(b"\n")
    child.stdin.flush()
    peak = imports
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(0.005)
    end = time.perf_counter()
    if child.returncode:
        raise SystemExit(f"the rewrite of {model.name} failed with {child.returncode}")
    return {
        "seconds": round(end - ready, 2),
        "seconds_with_imports": round(end - begun, 2),
        "peak_anonymous_over_imports_bytes": peak - imports,
        "imports_anonymous_bytes": imports,
    }
