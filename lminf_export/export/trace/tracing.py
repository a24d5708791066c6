"""From a model's configuration to an ONNX graph, without its weights.

The model is built on the meta device, so tracing costs the same for 1 million parameters as
for 70 billion. Weights are named placeholders in the graph until `pipelines.attached`.
"""

from __future__ import annotations

import copy
import gc
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from lminf_export.checkpoint.conversion import Conversion
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.errors import ExportError
from lminf_export.export.passes import pipelines
from lminf_export.export.trace.layer_records import (
    Record,
    UnlikeLayersError,
    check_first,
    find_stack,
    find_templates,
    record,
    shortened,
)
from lminf_export.models import experts
from lminf_export.models.base import AttentionPlan, Family
from lminf_export.models.steps import LambdaModel, PlanTables
from lminf_export.operator import attention_body, positions, torch_operator
from lminf_export.operator.bindings import TensorSpec
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.tensors.torch_dtypes import torch_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """A graph whose weights are still names.

    Attributes:
        model: the ONNX model, not yet optimised.
        weight_names: initializer name → every name the model has for it.
        conversion: how a checkpoint's tensors become the model's.
        constants: initializer name → its value (rotary tables and the like).
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


class TracedModule:
    """A patched model as the module that is traced, and what crosses its border."""

    def __init__(self, model: nn.Module, plan: AttentionPlan, contract: GraphContract) -> None:
        self.model, self.plan, self.contract = model, plan, contract
        tables = PlanTables(plan, torch_dtype(contract.dtype))
        self.constants = {f"tables.{name}": value for name, value in tables.named_buffers()}
        self.wrapped = LambdaModel(model, plan, copy.deepcopy(tables).to("meta")).eval()
        self.inputs = contract.inputs()

    def first(self, count: int) -> TracedModule:
        """Return the same for a model of the first `count` layers."""
        plan = self.plan.of_first(count)
        return TracedModule(self.model, plan, replace(self.contract, layers=plan.layers))

    def record(self, stack: str) -> Record:
        """Write down what the module computes, on sizes that nothing else in it has."""
        tensors = _example(self.inputs, smallest=10007)
        names = [spec.name for spec in self.inputs]
        return record(self.wrapped, dict(zip(names, tensors, strict=True)), _call(tensors), stack)

    def to_onnx(self) -> ir.Model:
        """Trace every layer.

        Raises:
            ExportError: torch could not trace or translate the model.
        """
        try:
            program = torch.onnx.export(
                self.wrapped,
                _call(_example(self.inputs)),
                dynamo=True,
                opset_version=attention_body.OPSET,
                dynamic_shapes=_call(_dynamic_shapes(self.inputs)),
                input_names=[spec.name for spec in self.inputs],
                output_names=[spec.name for spec in self.contract.outputs()],
                custom_translation_table={
                    **torch_operator.translation_table(),
                    **positions.translation_table(),
                    **experts.translation_table(),
                },
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ExportError(f"torch could not translate this model to ONNX: {reason}") from error
        assert program is not None  # None is for exports straight to a file
        return program.model


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
        names = _tensor_names(module.wrapped)
        pipelines.run(onnx_model, pipelines.repeated_layers(stack, templates.of_later, names))
    except UnlikeLayersError as error:
        logger.info("every layer is traced by itself: %s", error)
        return None
    logger.info("%d of %d layers traced", templates.traced, len(module.plan.layers))
    return onnx_model


def _tensor_names(module: nn.Module) -> list[str]:
    """Return the names of weights and constants in the order of a trace."""
    parameters = module.named_parameters(remove_duplicate=False)  # tied ones go by either name
    return [name for name, _ in (*parameters, *module.named_buffers(remove_duplicate=False))]


def _call(values: list[Any]) -> tuple[Any, ...]:
    """Group values, one for each input, into the arguments of the module."""
    return (*values[:4], values[4:])


def _example(specs: Sequence[TensorSpec], smallest: int = 2) -> list[Tensor]:
    """Make meta inputs; each symbol has a size of its own, never 0 or 1."""
    symbols = sorted({d for spec in specs for d in spec.shape if isinstance(d, str)})
    sizes = {symbol: smallest + index for index, symbol in enumerate(symbols)}
    return [
        torch.empty(
            [sizes[d] if isinstance(d, str) else d for d in spec.shape],
            dtype=torch_dtype(spec.dtype),
            device="meta",
        )
        for spec in specs
    ]


def _dynamic_shapes(specs: Sequence[TensorSpec]) -> list[dict[int, Any]]:
    names = {d for spec in specs for d in spec.shape if isinstance(d, str)}
    dims = {name: torch.export.Dim(name) for name in names}
    return [
        {axis: dims[d] for axis, d in enumerate(spec.shape) if isinstance(d, str)} for spec in specs
    ]


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
