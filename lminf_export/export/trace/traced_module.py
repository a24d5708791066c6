"""The module that torch traces: a patched model, its example inputs and its dynamic shapes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from lminf_export.errors import ExportError
from lminf_export.export.trace.layer_records import LayerRecords, record
from lminf_export.models import experts
from lminf_export.models.base import AttentionPlan
from lminf_export.models.steps import LambdaModel, PlanTables
from lminf_export.operator import attention_body, positions, torch_operator
from lminf_export.operator.bindings import TensorSpec
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.tensors.torch_dtypes import torch_dtype


class TracedModule:
    """A patched model as the module that torch traces, with its inputs and outputs.

    Args:
        model: patched, on the meta device.
        plan: how its layers attend.
        contract: its inputs and outputs.

    Attributes:
        constants: name in the graph → value, for rotary tables and the like.
        wrapped: the module itself.
        inputs: names, shapes and element types of its inputs.
    """

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

    def tensor_names(self) -> list[str]:
        """Return the names of weights and constants in the order in which a trace has them."""
        # Tied weights are listed under each of their names.
        parameters = self.wrapped.named_parameters(remove_duplicate=False)
        buffers = self.wrapped.named_buffers(remove_duplicate=False)
        return [name for name, _ in (*parameters, *buffers)]

    def record(self, stack: str) -> LayerRecords:
        """LayerRecords the operations of the module, on sizes that nothing else in it has."""
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
