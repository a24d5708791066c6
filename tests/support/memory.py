"""How much memory of its own a piece of code takes, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

MIB = 2**20

# Samples its own anonymous memory, before and while it runs the code in its first argument.
_MEASURE = """
    import importlib, sys, threading, time

    code, imports = sys.argv[1], sys.argv[2].split()
    for name in imports:
        importlib.import_module(name)

    def anonymous():
        with open("/proc/self/status") as status:
            return next(int(l.split()[1]) for l in status if l.startswith("RssAnon")) * 1024

    before, peak, done = anonymous(), 0, False

    def sample():
        global peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.005)

    thread = threading.Thread(target=sample)
    thread.start()
    exec(code)
    done = True
    thread.join()
    print(peak - before)
"""
_EXPORT_IMPORTS = ("lminf_export.export.run", "torch.onnx")


def peak_of(code: str, *imports: str) -> int:
    """Run Python code; return the bytes taken at most over what these imports took."""
    command = [sys.executable, "-c", textwrap.dedent(_MEASURE), code, " ".join(imports)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(run.stdout.split()[-1])


def peak_of_export(folder: Path, out: Path, code: str) -> int:
    """Export a model; return the bytes taken at most over what its imports took.

    Without the comparison with the unmodified model, which holds one layer in float32.

    Args:
        folder: the model.
        out: the bundle.
        code: module of transformers that has its code.
    """
    settings = {"window_size": 64, "dtype": "float16", "check": False}
    call = f"lminf_export.export({str(folder)!r}, {str(out)!r}, **{settings})"
    return peak_of(f"import lminf_export; {call}", *_EXPORT_IMPORTS, code)
