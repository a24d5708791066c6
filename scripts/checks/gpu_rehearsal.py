"""Rehearse the GPU suite as a borrowed machine runs it: a carried folder, few packages, no network.

    python -m scripts.checks.gpu_rehearsal --python /path/to/a/python3.12/bin/python

The files that git tracks, as they are now, are copied to an empty folder; there the given Python
runs the whole suite on the block emulation, in a network namespace of its own where the system
allows one. That Python needs torch, numpy, psutil, cmake and ninja (scripts/README.md). A second
call must find nothing left to do. With --ort it also runs the stages of onnxruntime over tiny
models on the CPU, which need the packages of an export.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Steps that the emulation cannot take; everything else has to be right.
NEED_A_GPU = {"graph_capture", "hopper_kernel", "kernel_times", "counters", "tensorrt_rtx"}
NEED_MORE = {"harness", "onnxruntime"}  # TensorRT's headers; onnx and onnxruntime


def carried(folder: Path) -> Path:
    """Copy every file that git tracks into a folder and return it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return folder


def without_network() -> list[str]:
    """Return the words that start a command without a network, none where that is not allowed."""
    words = ["unshare", "--map-root-user", "--net"]
    if shutil.which(words[0]) is None:
        return []
    allowed = subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
    return words if allowed else []


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--ort", action="store_true", help="the stages of onnxruntime, too")
    options = parser.parse_args()
    alone = without_network()
    if not alone:
        print("the network stays: this system allows no namespace", file=sys.stderr)
    binaries = str(options.python.parent)
    environment = {
        "PATH": os.pathsep.join([binaries, os.environ["PATH"]]),
        "HOME": os.environ.get("HOME", "/"),
    }
    with tempfile.TemporaryDirectory() as folder:
        tree = carried(Path(folder) / "tree")
        results = Path(folder) / "results"
        suite = [str(options.python), "scripts/gpu_suite.py", "--emulate", "--quick"]
        for _ in range(2):
            said = subprocess.run(
                [*alone, *suite, "--results", str(results)],
                cwd=tree, env=environment, check=False, capture_output=True, text=True,
            ).stderr  # fmt: skip
        (path,) = results.glob("gpu-*.json")
        steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
        wrong = {
            name: step.get("reason", step["status"])
            for name, step in steps.items()
            if step["status"] != "ok" and name not in NEED_A_GPU | NEED_MORE
        }
        again = [line for line in said.splitlines() if ": ok" in line]
        if options.ort:
            stages = ["-m", "scripts.gpu.onnxruntime_gpu", "--stage", "all", "--provider", "cpu"]
            subprocess.run(
                [*alone, str(options.python), *stages, "--quick", "--results", str(results),
                 "--work", folder],
                cwd=tree, env=environment, check=True,
            )  # fmt: skip
    for name, step in steps.items():
        print(f"{name}: {step['status']} in {step['seconds']} s {step.get('reason', '')}")
    if again:
        print(f"the second call ran again: {' '.join(again)}", file=sys.stderr)
    return int(bool(wrong or again))


if __name__ == "__main__":
    sys.exit(main())
