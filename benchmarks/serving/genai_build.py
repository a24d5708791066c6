"""Write onnxruntime-genai's graph of a checkpoint with its own builder, in float32 or int4.

Its builder reads the rotation of Gemma 3 as transformers 4 wrote it; of newer configurations this
gives it the same two numbers under the old names. Run it by a Python that has onnxruntime-genai:

    python -m benchmarks.serving.genai_build --model FOLDER --out FOLDER --precision fp32
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any


def take_nested_rotation() -> None:
    """Let the builder of Gemma 3 read `rope_parameters` of each kind of layer."""
    import onnxruntime_genai.models  # noqa: F401  # puts its builders on the path
    from builders.base import Model
    from builders.gemma import Gemma3Model

    known = Model.__init__
    init = Model.make_rope_init

    def begin(self: Any, config: Any, *more: Any) -> None:
        nested = getattr(config, "rope_parameters", None) or {}
        if isinstance(self, Gemma3Model) and "full_attention" in nested:
            config.rope_theta = nested["full_attention"]["rope_theta"]
            config.rope_local_base_freq = nested["sliding_attention"]["rope_theta"]
        known(self, config, *more)

    def rotation(self: Any, config: Any) -> None:
        if "full_attention" not in (getattr(config, "rope_parameters", None) or {}):
            init(self, config)

    Model.__init__, Model.make_rope_init = begin, rotation


def build(model: Path, to: Path, precision: str) -> None:
    take_nested_rotation()
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as work:
        made = Path(work) / "made"
        sys.argv[1:] = [
            *("-m", "checkpoint", "-i", str(model), "-o", str(made)),
            *("-p", precision, "-e", "cpu", "-c", str(Path(work) / "cache")),
        ]
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
        os.replace(made, to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", choices=["fp32", "int4"], default="fp32")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"{arguments.out} exists already")
    build(arguments.model, arguments.out, arguments.precision)


if __name__ == "__main__":
    main()
