"""A bundle in NVIDIA's Triton Inference Server, which runs out of PyPI's wheel.

    python -m benchmarks.scaling.triton_run --bundle BUNDLE --work FOLDER \\
        --out benchmarks/results/triton_run.json

Makes an environment with the server and its client in FOLDER if there is none, and runs
`benchmarks.scaling.triton_cases` in it: a repository by `export_triton`, served at 127.0.0.1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.scaling.triton_server import ROOT, make_environment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="of the server's environment")
    parser.add_argument("--rounds", type=int, default=5, help="of the rate's measure")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    place = make_environment(arguments.work.resolve() / "triton-env")
    command = [
        str(place / "bin" / "python"), "-m", "benchmarks.scaling.triton_cases",
        "--bundle", str(arguments.bundle.resolve()), "--environment", str(place),
        "--rounds", str(arguments.rounds), "--tokens", str(arguments.tokens),
    ]  # fmt: skip
    if arguments.out is not None:
        command += ["--out", str(arguments.out.resolve())]
    sys.exit(subprocess.run(command, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
