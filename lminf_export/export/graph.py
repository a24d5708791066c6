"""The graph of a bundle: traced, optimised, weights attached, the operator's body beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from torch import Tensor

from lminf_export.errors import ExportError
from lminf_export.export.background_weights import BackgroundWeights
from lminf_export.export.onnx_dtypes import dtype_name, onnx_dtype
from lminf_export.export.passes.attach_weights import attach
from lminf_export.export.passes.fuse_linear_operators import own_linear
from lminf_export.export.passes.number_names import number_names
from lminf_export.export.passes.pipelines import optimize
from lminf_export.export.passes.quantize_projections import (
    Quantized,
    attach_quantized,
    choose_weights,
    quantize_graph,
)
from lminf_export.export.trace.tracing import Trace
from lminf_export.models.base import AttentionPlan
from lminf_export.operator import attention_body, torch_operator
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.quantize import stored as quantized_weights
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.tensors.files import FILE_NAME, find_weights
from lminf_export.tensors.link import link_weights
from lminf_export.tensors.pieces import Converted
from lminf_export.tensors.stored import SourceTensor
from lminf_export.tensors.writing import write_pieces

logger = logging.getLogger(__name__)

IR_VERSION = 11
PRODUCER = "lminf-export"


@dataclass(frozen=True)
class WrittenWeights:
    """What went into the weights file.

    Attributes:
        files: weights files by name, and the SHA-256 of what was written rather than linked.
        num_bytes: of all of them.
        full_stacks: names of stacks of matrices that a quantisation left in full.
        full_bytes: what they take.
    """

    files: dict[str, str | None]
    num_bytes: int
    full_stacks: tuple[str, ...] = ()
    full_bytes: int = 0


def write_graph(
    trace: Trace,
    plan: AttentionPlan,
    checkpoint: Mapping[str, SourceTensor],
    path: Path,
    *,
    metadata: Mapping[str, str],
    quantize: QuantizeConfig | None = None,
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
        link: put hard links to the checkpoint's files beside the graph instead of a copy.
        background: the weights file, if it is being written already.
        progress: told the bytes of weights written.

    Raises:
        ModelError: the checkpoint does not fit the configuration.
        ExportError: the graph is not what the contract asks for.
    """
    model, dtype = trace.model, trace.contract.dtype
    optimize(model)
    sources, aliases = _find_weights(trace, checkpoint)
    if link:
        written = _link_weights(model, sources, dtype, path.parent)
    else:
        pieces = _weight_pieces(model, sources, aliases, dtype, quantize)
        file = path.with_name(weights_name(quantize))
        written = _write_weights(model, *pieces, file, background, progress)
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
    own_linear(model)
    _attach_constants(model, trace.constants)
    number_names(model, _stored_names(model, trace.constants))
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = PRODUCER, metadata.get("lminf_export", "")
    model.graph.name = "lambda_decoder"
    model.metadata_props.update(metadata)
    features = _features(plan, int8_cache=trace.contract.int8_cache)
    function = ir.serde.deserialize_function(attention_body.function_body(features))
    model.functions[function.identifier()] = function
    _declare_shapes(model, trace.contract)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()  # torch's notes on where it comes from
    ir.save(model, path)
    _check(path)


def _features(plan: AttentionPlan, *, int8_cache: bool) -> attention_body.BodyFeatures:
    return attention_body.BodyFeatures(
        rotary=bool(plan.rotations),
        alibi=plan.alibi_slopes is not None,
        softcap=bool(plan.softcap),
        sink_logits=plan.sink_logits,
        int8_cache=int8_cache,
    )


def _find_weights(
    trace: Trace, checkpoint: Mapping[str, SourceTensor]
) -> tuple[dict[str, SourceTensor], dict[str, tuple[str, ...]]]:
    """Match weights to the checkpoint; return tensors and all of a weight's names, by initializer.

    An initializer gets the name its tensor has in the bundle: the model's, and for tied weights
    the first of theirs that the checkpoint has.
    """
    checkpoint = trace.conversion.apply(checkpoint)
    model, initializers = trace.model, trace.model.graph.initializers
    names = {n: c for n, c in trace.weight_names.items() if n in initializers}
    shapes = {n: tuple(initializers[n].shape.numpy()) for n in names}  # type: ignore[union-attr]
    found = find_weights(checkpoint, names, shapes)
    stored_name = {n: _stored_name(candidates, checkpoint) for n, candidates in names.items()}
    for old, new in stored_name.items():
        _rename_initializer(model, old, new)
    sources = {stored_name[n]: tensor for n, tensor in found.items()}
    return sources, {stored_name[n]: candidates for n, candidates in names.items()}


def _link_weights(
    model: ir.Model, sources: Mapping[str, SourceTensor], dtype: str, folder: Path
) -> WrittenWeights:
    stored = link_weights(folder, sources, dtype)
    attach(model, stored)
    paths = {tensor.path for tensor in stored.values()}
    sizes = [path.stat().st_size for path in paths]
    return WrittenWeights(dict.fromkeys(sorted(path.name for path in paths)), sum(sizes))


def _weight_pieces(
    model: ir.Model,
    sources: Mapping[str, SourceTensor],
    aliases: Mapping[str, tuple[str, ...]],
    dtype: str,
    quantize: QuantizeConfig | None,
) -> tuple[list[Converted], list[Quantized] | None]:
    """Return the weights kept in full and those quantised, for which the graph is rewritten.

    The second is None, not empty, where nothing was to be quantised.
    """
    quantized: list[Quantized] | None = None
    if quantize is not None:
        choices = choose_weights(model, aliases, quantize)
        quantized = quantize_graph(model, choices, sources, quantize, dtype)
    kept = {n: tensor for n, tensor in sources.items() if n in model.graph.initializers}
    types = {n: _stored_type(model.graph.initializers[n], dtype) for n in kept}
    return [Converted(n, tensor, types[n]) for n, tensor in kept.items()], quantized


def _write_weights(
    model: ir.Model,
    full: Sequence[Converted],
    quantized: Sequence[Quantized] | None,
    path: Path,
    background: BackgroundWeights | None,
    progress: Callable[[int], None],
) -> WrittenWeights:
    pieces = [*full, *(quantized or ())]
    if background is not None and background.holds(pieces):
        stored, digest = background.result(progress)
    else:
        if background is not None:
            logger.info("the graph asks for other weights than foreseen; they are written again")
            background.stop()
        stored, digest = write_pieces(path, pieces, progress)
    attach(model, {piece.name: stored[piece.name] for piece in full})
    attach_quantized(model, quantized or (), stored)
    stacks = [p for p in full if quantized is not None and len(p.tensor.shape) > 2]
    return WrittenWeights(
        files={path.name: digest},
        num_bytes=path.stat().st_size,
        full_stacks=tuple(piece.name for piece in stacks),
        full_bytes=sum(stored[piece.name].length for piece in stacks),
    )


def weights_name(quantize: QuantizeConfig | None) -> str:
    """Return the name of a bundle's weights file."""
    return FILE_NAME if quantize is None else quantized_weights.FILE_NAME


def _stored_type(value: ir.Value, dtype: str) -> str:
    """Return a weight's element type: some routers compute in float32 whatever the model does."""
    return dtype if value.dtype is None else dtype_name(value.dtype)


def _stored_name(candidates: tuple[str, ...], checkpoint: Mapping[str, SourceTensor]) -> str:
    return next(name for name in candidates if name in checkpoint)


def _rename_initializer(model: ir.Model, old: str, new: str) -> None:
    value = model.graph.initializers.pop(old)
    value.name = new
    model.graph.initializers[new] = value


def _attach_constants(model: ir.Model, constants: Mapping[str, Tensor]) -> None:
    for name, tensor in constants.items():
        value = model.graph.initializers.get(name)
        if value is not None:
            value.const_value = ir.tensor(tensor, name=name)
    empty = [n for n, value in model.graph.initializers.items() if value.const_value is None]
    if empty:
        raise ExportError(f"the graph has constants without a value: {', '.join(empty[:3])}")


def _stored_names(model: ir.Model, constants: Collection[str]) -> set[str]:
    """Return the names of weights and of the plan's constants; others are the graph's own."""
    return {
        name
        for name, value in model.graph.initializers.items()
        if name in constants or isinstance(value.const_value, ir.ExternalTensor)
    }


def _declare_shapes(model: ir.Model, contract: GraphContract) -> None:
    """Give inputs and outputs exactly the shapes and types of the contract."""
    pairs = [*zip(model.graph.inputs, contract.inputs(), strict=True)]
    pairs += zip(model.graph.outputs, contract.outputs(), strict=True)
    for value, spec in pairs:
        if value.name != spec.name or value.dtype != onnx_dtype(spec.dtype):
            raise ExportError(
                f"the graph has {value.name!r} of {value.dtype} where the contract has "
                f"{spec.name!r} of {spec.dtype}"
            )
        value.shape = ir.Shape(spec.shape)


def _check(path: Path) -> None:
    """Check the graph by onnx's own checker; the operator itself it knows from its schema.

    The checker takes weights with hard links for an attack, so linked ones are left out; that
    they are where the graph says, `read_header` has checked.
    """
    torch_operator.register_schema()
    checked: str | onnx.ModelProto = str(path)
    if any(file.stat().st_nlink > 1 for file in path.parent.glob("*.safetensors")):
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
