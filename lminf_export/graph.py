"""The graph of a bundle: traced, optimised, weights attached, the operator's body beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from torch import Tensor

from lminf_export import bindings, onnx_function, op, weights
from lminf_export.errors import ExportError
from lminf_export.models.base import AttentionPlan
from lminf_export.passes import optimize
from lminf_export.quantize import stored as quantized_weights
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.quantize.rewrite import attach_quantized, choose_weights, quantize_graph
from lminf_export.tracing import Trace

IR_VERSION = 11
ELEMENT_TYPES = {
    "int64": ir.DataType.INT64,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
PRODUCER = "lminf-export"


@dataclass(frozen=True)
class WrittenWeights:
    """What went into the weights file.

    Attributes:
        sha256: of the file.
        num_bytes: of the file.
        full_stacks: names of stacks of matrices that a quantisation left in full.
        full_bytes: what they take.
    """

    sha256: str
    num_bytes: int
    full_stacks: tuple[str, ...] = ()
    full_bytes: int = 0


def weights_name(quantize: QuantizeConfig | None) -> str:
    """Return the weights file's name; quantised weights are no checkpoint of transformers."""
    return weights.FILE_NAME if quantize is None else quantized_weights.FILE_NAME


def write_graph(
    trace: Trace,
    plan: AttentionPlan,
    dtype: str,
    checkpoint: Mapping[str, weights.SourceTensor],
    path: Path,
    *,
    metadata: Mapping[str, str],
    quantize: QuantizeConfig | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> WrittenWeights:
    """Write a graph, and its weights beside it.

    Args:
        trace: the traced model; it is changed and used up.
        plan: how its layers attend.
        dtype: element type of weights and caches.
        checkpoint: the source's tensors.
        path: the graph's file, in an existing folder.
        metadata: ONNX metadata_props.
        quantize: how weights are quantised, its form decided; None for not at all.
        progress: told the bytes of weights written.

    Raises:
        ModelError: the checkpoint does not fit the configuration.
        ExportError: the graph is not what the contract asks for.
    """
    model = trace.model
    optimize(model)
    written = _attach_weights(trace, checkpoint, dtype, path.parent, quantize, progress)
    save_graph(trace, plan, dtype, path, metadata=metadata)
    return written


def save_graph(
    trace: Trace, plan: AttentionPlan, dtype: str, path: Path, *, metadata: Mapping[str, str]
) -> None:
    """Write an optimised graph whose weights are attached, with all else it is made of.

    Args:
        trace: its model is changed.
        plan: how its layers attend.
        dtype: element type of weights and caches.
        path: the graph's file; its weights are in the same folder.
        metadata: ONNX metadata_props.

    Raises:
        ExportError: the graph is not what the contract asks for.
    """
    model = trace.model
    _attach_constants(model, trace.constants)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = PRODUCER, metadata.get("lminf_export", "")
    model.graph.name = "lambda_decoder"
    model.metadata_props.update(metadata)
    function = ir.serde.deserialize_function(onnx_function.function_body(_features(plan)))
    model.functions[function.identifier()] = function
    _declare_shapes(model, plan, dtype)
    ir.save(model, path)
    _check(path)


def _features(plan: AttentionPlan) -> onnx_function.BodyFeatures:
    return onnx_function.BodyFeatures(
        rotary=bool(plan.rotations),
        alibi=plan.alibi_slopes is not None,
        softcap=bool(plan.softcap),
        sink_logits=plan.sink_logits,
    )


def _attach_weights(
    trace: Trace,
    checkpoint: Mapping[str, weights.SourceTensor],
    dtype: str,
    folder: Path,
    quantize: QuantizeConfig | None,
    progress: Callable[[int], None],
) -> WrittenWeights:
    checkpoint = trace.conversion.apply(checkpoint)
    model, initializers = trace.model, trace.model.graph.initializers
    names = {n: c for n, c in trace.weight_names.items() if n in initializers}
    shapes = {n: tuple(initializers[n].shape.numpy()) for n in names}  # type: ignore[union-attr]
    found = weights.find_weights(checkpoint, names, shapes)
    # In the bundle a tensor has the model's name; a tied one the first the checkpoint has.
    stored_name = {n: _stored_name(candidates, checkpoint) for n, candidates in names.items()}
    for old, new in stored_name.items():
        _rename_initializer(model, old, new)
    sources = {stored_name[n]: tensor for n, tensor in found.items()}
    quantized = []
    if quantize is not None:
        aliases = {stored_name[n]: candidates for n, candidates in names.items()}
        choices = choose_weights(model, aliases, quantize)
        quantized = quantize_graph(model, choices, sources, quantize, dtype)
    full = [weights.Converted(n, t, dtype) for n, t in sources.items() if n in initializers]
    path = folder / weights_name(quantize)
    stored, digest = weights.write_pieces(path, [*full, *quantized], progress)
    weights.attach(model, {piece.name: stored[piece.name] for piece in full})
    attach_quantized(model, quantized, stored)
    stacks = [p for p in full if quantize is not None and len(p.tensor.shape) > 2]
    return WrittenWeights(
        sha256=digest,
        num_bytes=path.stat().st_size,
        full_stacks=tuple(piece.name for piece in stacks),
        full_bytes=sum(stored[piece.name].length for piece in stacks),
    )


def _stored_name(
    candidates: tuple[str, ...], checkpoint: Mapping[str, weights.SourceTensor]
) -> str:
    return next(name for name in candidates if name in checkpoint)


def _rename_initializer(model: ir.Model, old: str, new: str) -> None:
    value = model.graph.initializers.pop(old)
    value.name = new
    model.graph.initializers[new] = value


def _attach_constants(model: ir.Model, constants: Mapping[str, Tensor]) -> None:
    for name, tensor in constants.items():
        value = model.graph.initializers.get(name)
        if value is not None:
            value.const_value = ir.tensor(tensor.numpy(), name=name)
    empty = [n for n, value in model.graph.initializers.items() if value.const_value is None]
    if empty:
        raise ExportError(f"the graph has constants without a value: {', '.join(empty[:3])}")


def _declare_shapes(model: ir.Model, plan: AttentionPlan, dtype: str) -> None:
    """Give inputs and outputs exactly the shapes and types of the contract."""
    inputs = bindings.input_specs(plan.layers, dtype)
    vocab_size = model.graph.outputs[0].shape[2]  # type: ignore[index]
    outputs = bindings.output_specs(plan.layers, dtype, int(vocab_size))  # type: ignore[arg-type]
    pairs = [*zip(model.graph.inputs, inputs, strict=True)]
    pairs += zip(model.graph.outputs, outputs, strict=True)
    for value, spec in pairs:
        if value.name != spec.name or value.dtype != ELEMENT_TYPES[spec.dtype]:
            raise ExportError(
                f"the graph has {value.name!r} of {value.dtype} where the contract has "
                f"{spec.name!r} of {spec.dtype}"
            )
        value.shape = ir.Shape(spec.shape)


def _check(path: Path) -> None:
    """Check the graph by onnx's own checker; the operator itself it knows from its schema."""
    op.register_schema()
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"onnx rejects the exported graph: {str(error).splitlines()[0]}"
        ) from error
