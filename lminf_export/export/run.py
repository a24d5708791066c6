"""One model in, one bundle out: load → adapt → trace → optimise → weights → engine → manifest."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lminf_export.bundle.destination import check_destination
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.writer import BundleWriter
from lminf_export.checkpoint.from_bundle import bundle_notice
from lminf_export.checkpoint.opening import open_checkpoint
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.checkpoint.source import open_source
from lminf_export.disk import exists, user_path
from lminf_export.errors import ConfigError, ModelError
from lminf_export.export.background_weights import BackgroundWeights, expected_pieces
from lminf_export.export.calibration import Calibration, calibration_batch
from lminf_export.export.decisions import (
    LINK_NOTICE,
    check_cache_size,
    check_calibration,
    check_linked,
    check_weights,
    decide_kv_cache_dtype,
    default_dtype,
    default_window,
    dtype_notices,
    key_bias_notices,
    memory_notices,
    weight_notices,
)
from lminf_export.export.engine import (
    add_engine,
    check_rings,
    choose_builder,
    out_target,
    plugin_notices,
)
from lminf_export.export.graph import write_graph
from lminf_export.export.job import ExportJob, graph_metadata
from lminf_export.export.license_files import copy_license_files
from lminf_export.export.options import LINK, ExportOptions, signature_with_options
from lminf_export.export.quantized_weights import calibrated_notices, kept_notices, with_blocks
from lminf_export.export.spot_check import check_graph
from lminf_export.export.tokenizer_check import TOKENIZER
from lminf_export.export.tokenizer_files import copy_tokenizer_files, eos_notices
from lminf_export.export.trace.tracing import trace
from lminf_export.export.weight_files import WrittenWeights, weights_name
from lminf_export.models.aliases import alias_notice
from lminf_export.models.registry import family_of
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import as_integer
from lminf_export.progress import Progress, byte_counter, silent
from lminf_export.quantize.config import decide_form
from lminf_export.tensors.torch_dtypes import torch_dtype

logger = logging.getLogger(__name__)


def export(
    model: str | Path, out: str | Path, *, progress: Progress = silent, **options: Any
) -> Bundle:
    """Export a model of Hugging Face to a bundle that decodes a stream without end.

    Args:
        model: folder, GGUF file, or id on the Hugging Face hub.
        out: the bundle's folder, or DIR/NAME.plan or DIR/NAME.onnx for a bundle DIR with that
            as its last product.
        progress: called with the phase that runs.
        options: the other fields of `ExportOptions`, by their names.

    Returns:
        The written bundle.

    Raises:
        TypeError: an option of an unknown name.
        LminfError: in one line the expected, the found and the remedy; nothing is left behind.
    """
    unknown = sorted(options.keys() - {field.name for field in fields(ExportOptions)})
    if unknown:
        raise TypeError(f"export() got an unexpected keyword argument {unknown[0]!r}")
    return run_job(prepare(ExportOptions(model, out, **options), progress), progress)


# Read by inspect.
export.__signature__ = signature_with_options(export)  # type: ignore[attr-defined]


def prepare(options: ExportOptions, progress: Progress = silent) -> ExportJob:
    """Check every setting and the model, and decide all that is left open; write nothing.

    Raises:
        LminfError: as `export`.
    """
    if options.tokenizer is not None:
        raise ConfigError("tokenizer: is for ONNX models; a checkpoint's is in its own folder")
    target = out_target(options)
    dtype = default_dtype(options.dtype, target)
    kv_cache_dtype = decide_kv_cache_dtype(options.kv_cache_dtype, dtype, target)
    builder, plugin = choose_builder(options, target)
    check_rings(kv_cache_dtype, builder, options)
    quantize = decide_form(options.quantize, dtype, with_engine=target.engine_name is not None)
    check_weights(options.weights, quantize)
    check_calibration(options.calibrate, quantize)
    as_integer("max_batch_size", options.max_batch_size, 1)
    options.lambda_config(1 if options.window_size is None else options.window_size)
    # Mistakes in options come first; and before a model is fetched, that it has a place.
    if not exists(user_path(options.model, ModelError)):
        check_destination(target.directory, force=options.force)
    progress("reading the model", None)
    source = open_source(
        options.model,
        revision=options.revision,
        cache_dir=options.cache_dir,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
    )
    check_linked(options.weights, source)
    from_bundle = bundle_notice(source)
    family = family_of(source.config)
    training_length = family.training_length(source.config)
    window, notices = default_window(options.window_size, training_length)
    settings = options.lambda_config(window)
    if quantize is not None:
        quantize = quantize.for_width(getattr(source.config, "hidden_size", None))
    skeleton = Skeleton(source.config, torch_dtype(dtype))
    plan = family.plan(source.config, settings, lambda: skeleton.model)
    if kv_cache_dtype is not None and builder is not None:
        plan = replace(plan, key_bias_in_rings=True)  # the plugin knows no other rings
    contract = GraphContract(plan.layers, dtype, kv_cache_dtype, source.config.vocab_size)
    batch_size = options.max_batch_size if target.engine_name else 1
    check_cache_size(contract, settings, batch_size, training_length)
    notices += [from_bundle] if from_bundle else []
    notices += [alias_notice(source.named, source.model_type)] if source.named else []
    notices += plugin_notices(builder, options, plan)
    checkpoint = open_checkpoint(
        source, options.lora, skeleton=skeleton, allow_pickle=options.allow_pickle
    )
    family.check_weights(checkpoint.source.config, checkpoint.tensors)
    notices += [*plan.notices, *checkpoint.notices, *dtype_notices(options.dtype, dtype)]
    notices += [LINK_NOTICE] if options.weights == LINK else []
    notices += [*memory_notices(contract, settings), *eos_notices(source)]
    notices += key_bias_notices(checkpoint, kv_cache_dtype, plan)
    job = ExportJob(
        options=options,
        source=checkpoint.source,
        family=family,
        settings=settings,
        plan=plan,
        dtype=dtype,
        quantize=quantize,
        kv_cache_dtype=kv_cache_dtype,
        target=target,
        builder=builder,
        plugin=plugin,
        checkpoint=checkpoint,
        notices=tuple(notices),
    )
    job.manifest()  # what the configuration gets wrong shows here, not after the work
    check_destination(target.directory, force=options.force)
    return job


def run_job(job: ExportJob, progress: Progress = silent) -> Bundle:
    """Write the bundle of a prepared job.

    Raises:
        LminfError: as `export`.
    """
    with BundleWriter(job.target.directory, force=job.options.force) as writer:
        writer.require_space(0 if job.links_weights else job.weight_bytes)
        # The tokenizer comes first: it reads the text of a calibration.
        notices = copy_tokenizer_files(job.source, writer, with_index=job.links_weights)
        written, graph = _write_model(job, writer, progress)
        if job.options.check:
            progress("checking the graph", None)
            check_graph(job, graph.parent)
        for name, digest in written.files.items():
            writer.add(name, "weights")
            if digest is not None:
                writer.set_digest(name, digest)
        license = copy_license_files(job.source.folder, writer)
        engine, recipe = add_engine(job, writer, graph, progress)
        progress("hashing", None)
        linked = tuple(written.files) if job.links_weights else ()
        notices = [
            *weight_notices(written),
            *kept_notices(written.quantized),
            *calibrated_notices(job.options.calibrate is not None, written.quantized),
            *notices,
        ]
        draft = job.manifest(engine, recipe, notices)
        record = with_blocks(draft.quantization, written.quantized)
        draft = draft.model_copy(update={"linked_files": linked, "quantization": record})
        manifest = writer.commit(draft, license=license)
    for notice in manifest.notices:
        logger.warning(notice)
    return Bundle.open(job.target.directory)


def _write_model(
    job: ExportJob, writer: BundleWriter, progress: Progress
) -> tuple[WrittenWeights, Path]:
    """Trace the model and write graph and weights, side by side where that can be."""
    progress("tracing", None)
    graph = writer.add(job.target.graph_name, "graph")
    with ExitStack() as stack:
        background = _background_weights(job, graph)
        if background is not None:
            stack.enter_context(background)
        calibrate = _calibration(job, graph.parent, stack, progress)
        traced = trace(job.checkpoint.skeleton, job.family, job.plan, job.contract)
        written = write_graph(
            traced,
            job.plan,
            job.checkpoint.tensors,
            graph,
            metadata=_metadata(job),
            quantize=job.quantize,
            calibrate=calibrate.of if calibrate else None,
            link=job.links_weights,
            background=background,
            progress=byte_counter(progress, "writing weights", job.weight_bytes),
        )
    return written, graph


def _calibration(
    job: ExportJob, folder: Path, stack: ExitStack, progress: Progress
) -> Calibration | None:
    """Return the calibration that was asked for; its folder goes with the stack."""
    if job.options.calibrate is None:
        return None
    width = getattr(job.source.config, "hidden_size", 0)
    batch = calibration_batch(folder / TOKENIZER, Path(job.options.calibrate), width)
    spool = Path(stack.enter_context(TemporaryDirectory(prefix=".calibration-", dir=folder)))
    return Calibration(job.checkpoint, batch, spool, progress)


def _background_weights(job: ExportJob, graph: Path) -> BackgroundWeights | None:
    """Start to write weights that are stored as they come; others wait for the graph."""
    if job.quantize is not None or job.links_weights:
        return None
    pieces = expected_pieces(job.checkpoint.skeleton, job.checkpoint.tensors)
    return BackgroundWeights(graph.with_name(weights_name(None)), pieces) if pieces else None


def _metadata(job: ExportJob) -> dict[str, str]:
    """Return the essentials of the manifest as ONNX metadata_props."""
    cache = {"lminf.kv_cache_dtype": job.kv_cache_dtype} if job.kv_cache_dtype else {}
    return graph_metadata(
        model_type=job.source.model_type,
        source=job.source.name,
        dtype=job.dtype,
        settings=job.settings,
        layers=job.plan.layers,
        more={"lminf.quantize": job.quantize.weights if job.quantize else "none", **cache},
    )
