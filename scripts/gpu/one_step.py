"""Run one step of the suite and write its result: what scripts/gpu_suite.py starts.

    python -m scripts.gpu.one_step correctness --out step.json [--emulate] [--quick]

The exit code is 0 whatever the step found; its result says "failed".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True, help="file of the result")
    parser.add_argument("--build", type=Path, required=True, help="build folder")
    parser.add_argument("--library", type=Path, help="a liblminf_kernels.so built before")
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)

    def keep(result: dict[str, Any]) -> None:
        beside = options.out.with_suffix(".new")
        beside.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
        beside.replace(options.out)

    try:
        import torch

        from scripts.gpu.steps import perform
        from scripts.gpu.suite import SkipStep, suite_of
    except ModuleNotFoundError as error:
        keep({"status": "not run", "reason": f"no module {error.name} here"})
        return 0
    try:
        suite = suite_of(
            options.build, options.library, quick=options.quick, emulate=options.emulate, keep=keep
        )
    except SkipStep as reason:
        keep({"status": "not run", "reason": str(reason)})
        return 0
    # Steps run side by side and compare on the CPU, each a small tensor at a time.
    torch.set_num_threads(1)
    keep(perform(options.name, suite))
    return 0


if __name__ == "__main__":
    sys.exit(main())
