"""The steps of scripts/gpu_suite.py by name: each returns what it found, or why it did not run."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from scripts.gpu import kernel_steps, layer_steps, tool_steps
from scripts.gpu.suite import SkipStep, Suite, in_words

STEPS: dict[str, Callable[[Suite], dict[str, Any]]] = {
    "machine": tool_steps.machine,
    "build": tool_steps.build,
    "graph_capture": kernel_steps.graph_capture,
    "correctness": kernel_steps.correctness,
    "hopper_kernel": kernel_steps.hopper_kernel,
    "tall_kernel": kernel_steps.tall_kernel,
    "last_block": kernel_steps.last_block,
    "int8_rings": kernel_steps.int8_rings,
    "repeatability": kernel_steps.repeatability,
    "layers": layer_steps.layers,
    "harness": tool_steps.harness,
    "onnxruntime": tool_steps.onnxruntime,
    "timing": kernel_steps.timing,
    "choices": kernel_steps.choices,
    "kernel_times": kernel_steps.kernel_times,
    "counters": tool_steps.counters,
    "tensorrt_rtx": tool_steps.tensorrt_rtx,
    "sanitizer": tool_steps.sanitizer,
}


def perform(name: str, suite: Suite) -> dict[str, Any]:
    """Run one step; whatever it meets becomes part of the result, with the place it came from."""
    try:
        return STEPS[name](suite)
    except SkipStep as reason:
        return {"status": "not run", "reason": str(reason)}
    except Exception as error:  # noqa: BLE001 - the suite is there to tell, whatever it is
        where = traceback.format_exc().strip().splitlines()[-9:-1]
        said = str(error)[-3000:]
        return {"status": "failed", "reason": in_words(error), "said": said, "where": where}
