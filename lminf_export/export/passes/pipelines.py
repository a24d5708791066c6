"""Which passes a graph goes through, for each target, in order.

    torch's trace of some layers
      → repeated_layers                     all layers
      → without_data                        weights are names
      → optimized                           what every target starts with
      → named                               weights have the names of the bundle
      → quantized, if asked for             in blocks (onnxruntime) or Q/DQ (engines)
      → attached                            weights lie in files
      → finished                            model.onnx, for onnxruntime and all others
    model.onnx
      → for_engine                          engine.onnx: standard operators, or the plugin's

Weights are written between the steps, so each step is a function that returns its passes; who
holds the graph calls `run`. Passes of `onnx_ir` are used as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import PassBase, common
from torch import Tensor

from lminf_export.engine.common import EngineRequest, fixed_sizes
from lminf_export.export.passes.attach_attention_body import AttachAttentionBodyPass
from lminf_export.export.passes.attach_constants import AttachConstantsPass
from lminf_export.export.passes.attach_weights import AttachWeightsPass
from lminf_export.export.passes.choose_weights import WeightChoice
from lminf_export.export.passes.constant_reshape_targets import ConstantReshapeTargetsPass
from lminf_export.export.passes.declare_inputs_and_outputs import DeclareInputsAndOutputsPass
from lminf_export.export.passes.describe_model import DescribeModelPass
from lminf_export.export.passes.detach_weights import DetachWeightsPass
from lminf_export.export.passes.expand_rms_norm import ExpandRmsNormPass
from lminf_export.export.passes.fold_constants import FoldConstantsPass
from lminf_export.export.passes.freeze_sizes import FreezeSizesPass
from lminf_export.export.passes.fuse_linear_operators import FuseLinearOperatorsPass
from lminf_export.export.passes.fuse_rms_norm import FuseRmsNormPass
from lminf_export.export.passes.keep_tokens_flat import KeepTokensFlatPass
from lminf_export.export.passes.linear_to_gemm import LinearToGemmPass
from lminf_export.export.passes.name_nodes import NameNodesPass
from lminf_export.export.passes.name_plugin_nodes import NamePluginNodesPass
from lminf_export.export.passes.number_names import NumberNamesPass
from lminf_export.export.passes.quantize_to_blocks import QuantizeToBlocksPass
from lminf_export.export.passes.quantize_to_qdq import QuantizeToQdqPass
from lminf_export.export.passes.remove_attention_body import RemoveAttentionBodyPass
from lminf_export.export.passes.rename_initializers import RenameInitializersPass
from lminf_export.export.passes.repeat_layers import RepeatLayersPass
from lminf_export.export.passes.write_rings_linearly import WriteRingsLinearlyPass
from lminf_export.operator.attention_body import BodyFeatures
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.tensors.stored import StoredTensor

Passes = tuple[PassBase, ...]


def run(model: ir.Model, passes: Passes) -> None:
    """Edit a model in place by passes in order.

    `onnx_ir.passes.Sequential` is not used, since it turns every error into one of its own.

    Raises:
        LminfError: what a pass refuses that a user can cause.
        onnx_ir.passes.InvariantError: a pass got or made what its contract excludes: a bug here.
    """
    for step in passes:
        step(model)


def repeated_layers(stack: str, templates: Sequence[int], order: Sequence[str]) -> Passes:
    """From a trace of a model's first layers to one of all: see `RepeatLayersPass`."""
    return (RepeatLayersPass(stack, templates, order),)


def without_data() -> Passes:
    """From torch's trace to a graph whose weights are names."""
    return (DetachWeightsPass(),)


def optimized() -> Passes:
    """From there to the graph that every target starts with; weights are never read."""
    return (
        ConstantReshapeTargetsPass(),
        FoldConstantsPass(),
        FuseRmsNormPass(),
        LinearToGemmPass(),
        KeepTokensFlatPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.ClearMetadataAndDocStringPass(),
    )


def named(names: Mapping[str, str]) -> Passes:
    """To the names that weights have in the bundle."""
    return (RenameInitializersPass(names),)


def quantized(choices: Sequence[WeightChoice], config: QuantizeConfig) -> Passes:
    """To weights in blocks for onnxruntime, or behind DequantizeLinear for an engine."""
    if config.form == "qdq":
        return (QuantizeToQdqPass(choices),)
    return (QuantizeToBlocksPass(choices, config.accuracy_level),)


def attached(stored: Mapping[str, StoredTensor]) -> Passes:
    """To weights that lie in files beside the graph."""
    return (AttachWeightsPass(stored),)


def finished(
    contract: GraphContract,
    features: BodyFeatures,
    constants: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> Passes:
    """From a graph whose weights are attached to the bundle's, for onnxruntime and all others."""
    return (
        FuseLinearOperatorsPass(),
        AttachConstantsPass(constants),
        NumberNamesPass(constants.keys()),
        DescribeModelPass(metadata),
        AttachAttentionBodyPass(features),
        DeclareInputsAndOutputsPass(contract.inputs(), contract.outputs()),
    )


def for_engine(request: EngineRequest) -> Passes:
    """From the bundle's graph to that of an engine, whose attention is the plugin's or not."""
    return _for_plugin(request) if request.with_plugin else _for_standard_operators(request)


def _for_standard_operators(request: EngineRequest) -> Passes:
    # With the operator's body inlined, what all layers share exists once.
    return (
        common.InlinePass(),
        WriteRingsLinearlyPass(request.contract.ring_updates()),
        FreezeSizesPass(fixed_sizes(request), request.ring_names),
        *_tidied(),
    )


def _for_plugin(request: EngineRequest) -> Passes:
    return (
        RemoveAttentionBodyPass(),
        common.InlinePass(),
        NamePluginNodesPass(request.updated_in_place, len(request.contract.layers)),
        FreezeSizesPass(fixed_sizes(request), request.ring_names),
        ExpandRmsNormPass(),
        *_tidied(),
    )


def _tidied() -> Passes:
    return (
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedOpsetsPass(),
        NameNodesPass(),
    )
