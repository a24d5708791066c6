"""How much memory of its own an export takes, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

MIB = 2**20

# Samples its own anonymous memory, before and while it exports.
_MEASURE = """
    import importlib, sys, threading, time
    import lminf_export, lminf_export.export.run, torch.onnx
    importlib.import_module(sys.argv[3])

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
    # Without the comparison with the unmodified model, which holds one layer in float32.
    settings = {"window_size": 64, "dtype": "float16", "check": False}
    lminf_export.export(sys.argv[1], sys.argv[2], **settings)
    done = True
    thread.join()
    print(peak - before)
"""


def peak_of_export(folder: Path, out: Path, code: str) -> int:
    """Export a model; return the bytes taken at most over what its imports took.

    Args:
        folder: the model.
        out: the bundle.
        code: module of transformers that has its code.
    """
    command = [sys.executable, "-c", textwrap.dedent(_MEASURE), folder, out, code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(run.stdout.split()[-1])
