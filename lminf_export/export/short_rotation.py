"""A graph with the rotation of short texts, to be compared with a model on one.

A rotation that depends on a text's length is frozen in a graph. Frozen for long texts it is none
that the model has for the few tokens of a comparison.
"""

from __future__ import annotations

import re

import onnx
from onnx import numpy_helper

from lminf_export.models.base import AttentionPlan
from lminf_export.models.steps import PlanTables

_TURNS = re.compile(r"(limit_)?(cos|sin)_\d")


def rotate_as(model: onnx.ModelProto, plan: AttentionPlan, prefix: str) -> None:
    """Give a graph another plan's tables of rotations, in place.

    Args:
        model: the graph.
        plan: of the same layers.
        prefix: what the names of the graph's tables begin with.
    """
    tables = {prefix + name: table for name, table in PlanTables(plan).named_buffers()}
    for tensor in model.graph.initializer:
        name = tensor.name
        if name in tables and _TURNS.match(name.removeprefix(prefix)):
            tensor.CopyFrom(numpy_helper.from_array(tables[name].numpy(), name))
