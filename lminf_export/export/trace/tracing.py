"""From a model's configuration to an ONNX graph, without its weights.

The model is built on the meta device, so tracing costs the same for 1 million parameters as
for 70 billion. Weights are named placeholders in the graph until `pipelines.attached`.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from lminf_export.checkpoint.conversion import Conversion
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.errors import ExportError
from lminf_export.export.passes import pipelines
from lminf_export.export.trace.layer_records import (
    UnlikeLayersError,
    check_first,
    find_stack,
    find_templates,
    shortened,
)
from lminf_export.export.trace.traced_module import TracedModule
from lminf_export.models.base import AttentionPlan, Family
from lminf_export.operator.graph_contract import GraphContract

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """A graph whose weights are still names.

    Attributes:
        model: the ONNX model, not yet optimised.
        weight_names: initializer name → every name the model has for it.
        conversion: how a checkpoint's tensors become the model's.
        constants: initializer name → its value (rotary tables and the like).
        contract: inputs and outputs of the graph.
    """

    model: ir.Model
    weight_names: dict[str, tuple[str, ...]]
    conversion: Conversion
    constants: dict[str, Tensor]
    contract: GraphContract


def trace(
    skeleton: Skeleton, family: Family, plan: AttentionPlan, contract: GraphContract
) -> Trace:
    """Trace one step of the model into ONNX.

    Args:
        skeleton: of the model, in the contract's dtype.
        family: its adapter.
        plan: how its layers attend.
        contract: its inputs and outputs.

    Raises:
        ExportError: torch could not trace or translate the model.
    """
    model = skeleton.model
    module = TracedModule(model, plan, contract)
    with family.patched(model), _quiet_exporter(), _uncollected(), torch.no_grad():
        onnx_model = _trace_templates(module) or module.to_onnx()
    weight_names = _weight_names(skeleton, onnx_model, module.constants)
    pipelines.run(onnx_model, pipelines.without_data())
    return Trace(onnx_model, weight_names, skeleton.conversion, module.constants, contract)


def _trace_templates(module: TracedModule) -> ir.Model | None:
    """Trace the first layer of each signature, and copy it for later layers of the same one.

    Returns:
        The same graph as tracing every layer, or None where that cannot be shown.
    """
    if len(module.plan.layers) < 3:
        return None
    try:
        stack = find_stack(module.wrapped, len(module.plan.layers))
        whole = module.record(stack)
        templates = find_templates(whole.layers)
        with shortened(module.wrapped, stack, templates.traced):
            first = module.first(templates.traced)
            check_first(first.record(stack), whole)
            onnx_model = first.to_onnx()
        names = module.tensor_names()
        pipelines.run(onnx_model, pipelines.repeated_layers(stack, templates.of_later, names))
    except UnlikeLayersError as error:
        logger.info("every layer is traced by itself: %s", error)
        return None
    logger.info("%d of %d layers traced", templates.traced, len(module.plan.layers))
    return onnx_model


def _weight_names(
    skeleton: Skeleton, onnx_model: ir.Model, constants: dict[str, Tensor]
) -> dict[str, tuple[str, ...]]:
    """Find, for each initializer, the model's names of it; tied weights have several."""
    names = {name: group for group in skeleton.groups for name in group}
    found = {}
    for initializer in onnx_model.graph.initializers:
        name = initializer.removeprefix("model.")
        if initializer in constants:
            continue
        if name not in names:
            raise ExportError(
                f"the traced graph holds a constant {initializer!r} that is no tensor of the model"
            )
        found[initializer] = names[name]
    return found


@contextmanager
def _uncollected() -> Iterator[None]:
    """Turn garbage collection off: tracing makes millions of objects, and all of them stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence warnings of torch's exporter about torchvision and its internals."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
