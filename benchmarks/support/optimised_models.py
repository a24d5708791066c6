"""ONNX models as onnxruntime's own optimisers leave them.

Of graphs as exporters write them today, `onnxruntime.transformers.optimizer` fuses norms and
rotations, and no attention: its patterns of attention are those of exporters of 2023.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort


def fuse_by_script(graph: Path, to: Path) -> Counter[str]:
    """Fuse a graph with onnxruntime's script for transformers; return its operators."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("gpt2")
    options.use_multi_head_attention = True
    logging.disable(logging.WARNING)
    try:
        model = optimize_model(
            str(graph), model_type="gpt2", opt_level=0, optimization_options=options
        )
    finally:
        logging.disable(logging.NOTSET)
    model.save_model_to_file(str(to))
    return _operators(to)


def fuse_by_session(graph: Path, to: Path) -> Counter[str]:
    """Let a session write the graph that it runs; return its operators."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(to)
    options.log_severity_level = 4
    ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return _operators(to)


def _operators(graph: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(graph)).graph.node)
