"""The graph of a bundle: traced, optimised, weights attached, the operator's body beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from lminf_export.errors import ExportError
from lminf_export.export import weight_files
from lminf_export.export.background_weights import BackgroundWeights
from lminf_export.export.passes import pipelines
from lminf_export.export.passes.choose_weights import Quantized
from lminf_export.export.trace.tracing import Trace
from lminf_export.export.weight_files import WrittenWeights
from lminf_export.models.base import AttentionPlan
from lminf_export.operator import torch_operator
from lminf_export.operator.attention_body import BodyFeatures
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.tensors.stored import SourceTensor


def write_graph(
    trace: Trace,
    plan: AttentionPlan,
    checkpoint: Mapping[str, SourceTensor],
    path: Path,
    *,
    metadata: Mapping[str, str],
    quantize: QuantizeConfig | None = None,
    calibrate: Callable[[Sequence[Quantized]], list[Quantized]] | None = None,
    link: bool = False,
    background: BackgroundWeights | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> WrittenWeights:
    """Write a graph, and its weights beside it.

    Args:
        trace: the traced model; it is changed and used up.
        plan: how its layers attend.
        checkpoint: the source's tensors.
        path: the graph's file, in an existing folder.
        metadata: ONNX metadata_props.
        quantize: how weights are quantised, its form decided; None for not at all.
        calibrate: quantises weights beforehand, see `calibration.Calibration.of`.
        link: put hard links to the checkpoint's files beside the graph instead of a copy.
        background: the weights file, if it is being written already.
        progress: receives the bytes of weights written.

    Raises:
        ModelError: the checkpoint does not fit the configuration.
        ExportError: the graph is not what the contract asks for.
    """
    model, dtype = trace.model, trace.contract.dtype
    pipelines.run(model, pipelines.optimized())
    sources, aliases = weight_files.find_named_weights(trace, checkpoint)
    if link:
        written = weight_files.link_files(model, sources, dtype, path.parent)
    else:
        full, quantized = weight_files.weight_pieces(model, sources, aliases, dtype, quantize)
        if calibrate is not None and quantized is not None:
            quantized = calibrate(quantized)
        file = path.with_name(weight_files.weights_name(quantize))
        written = weight_files.write_files(model, full, quantized, file, background, progress)
    save_graph(trace, plan, path, metadata=metadata)
    return written


def save_graph(
    trace: Trace,
    plan: AttentionPlan,
    path: Path,
    *,
    metadata: Mapping[str, str],
) -> None:
    """Write an optimised graph whose weights are attached, with all else it is made of.

    Args:
        trace: its model is changed.
        plan: how its layers attend.
        path: the graph's file; its weights are in the same folder.
        metadata: ONNX metadata_props.

    Raises:
        ExportError: the graph is not what the contract asks for.
    """
    model = trace.model
    features = body_features(plan, int8_cache=trace.contract.int8_cache)
    steps = pipelines.finished(trace.contract, features, trace.constants, metadata)
    pipelines.run(model, steps)
    ir.save(model, path)
    check_graph_file(path)


def body_features(plan: AttentionPlan, *, int8_cache: bool) -> BodyFeatures:
    """Return what the operator's body needs for a plan."""
    return BodyFeatures(
        rotary=bool(plan.rotations),
        alibi=plan.alibi_slopes is not None,
        softcap=bool(plan.softcap),
        sink_logits=plan.sink_logits,
        int8_cache=int8_cache,
    )


def check_graph_file(path: Path) -> None:
    """Check the graph by onnx's own checker; the operator itself it knows from its schema.

    The checker takes weights with hard links for an attack, so linked ones are left out; that
    they are where the graph says, `read_header` has checked.

    Raises:
        ExportError: the checker refuses it.
    """
    torch_operator.register_schema()
    checked: str | onnx.ModelProto = str(path)
    if any(file.stat().st_nlink > 1 for file in path.parent.rglob("*") if file.is_file()):
        checked = onnx.load(path, load_external_data=False)
        initializers = list(checked.graph.initializer)
        del checked.graph.initializer[:]
        for tensor in initializers:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                value = onnx.helper.make_tensor_value_info(
                    tensor.name, tensor.data_type, tensor.dims
                )
                checked.graph.input.append(value)
            else:
                checked.graph.initializer.append(tensor)
    try:
        onnx.checker.check_model(checked, full_check=False)
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"onnx rejects the exported graph: {str(error).splitlines()[0]}"
        ) from error
