"""ONNX models by onnxruntime-genai's own builder, several in one process.

    python -m benchmarks.support.genai_models JOBS.json

where the file holds a list of {"model": folder, "out": folder, "precision": "fp32", "provider":
"cpu", "options": ["prune_lm_head=true"]}. What its builders read of configurations as transformers
4 wrote them is given to them under the old names.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

from benchmarks.serving.genai_build import take_nested_rotation

ROOT = Path(__file__).resolve().parents[2]


class Job(TypedDict):
    """One model to build."""

    model: str
    out: str
    precision: str
    provider: str
    options: list[str]


def build_models(jobs: Iterable[Job]) -> None:
    """Build models in a process of their own: the builder changes what it imports.

    Raises:
        RuntimeError: with the end of what the builder printed.
    """
    with tempfile.TemporaryDirectory() as work:
        listed = Path(work) / "jobs.json"
        listed.write_text(json.dumps(list(jobs)))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.support.genai_models", listed],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"onnxruntime-genai built no model: {done.stderr.strip()[-1500:]}")


def take_old_names() -> None:
    """Let builders read the settings of rotation that transformers 5 keeps in one table."""
    take_nested_rotation()
    from builders.base import Model

    known = Model.__init__

    def begin(self: Any, config: Any, *more: Any) -> None:
        nested = getattr(config, "rope_parameters", None) or {}
        if nested.get("rope_type") == "longrope":
            nested.setdefault("type", "longrope")
        if "original_max_position_embeddings" in nested:
            config.original_max_position_embeddings = nested["original_max_position_embeddings"]
        known(self, config, *more)

    Model.__init__ = begin


def main() -> None:
    take_old_names()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        with tempfile.TemporaryDirectory() as cache:
            sys.argv[1:] = [
                *("-m", "checkpoint", "-i", job["model"], "-o", job["out"], "-c", cache),
                *("-p", job["precision"], "-e", job["provider"]),
                *(["--extra_options", *job["options"]] if job["options"] else []),
            ]
            runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


if __name__ == "__main__":
    main()
