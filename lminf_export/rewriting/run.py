"""One ONNX model in, one bundle out: find → plan → assemble → weights → check → manifest."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lminf_export.bundle.copying import copy_file
from lminf_export.bundle.destination import check_destination
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.writer import BundleWriter
from lminf_export.checkpoint.source import CONFIG_FILES
from lminf_export.engine.options import ELSEWHERE
from lminf_export.export.decisions import (
    LINK_NOTICE,
    check_cache_size,
    check_weights,
    default_window,
    memory_notices,
)
from lminf_export.export.engine import add_engine, choose_builder, out_target, plugin_notices
from lminf_export.export.graph import body_features, check_graph_file
from lminf_export.export.license_files import copy_license_files
from lminf_export.export.options import LINK, ExportOptions, signature_with_options
from lminf_export.export.passes import pipelines
from lminf_export.export.passes.attach_attention_body import AttachAttentionBodyPass
from lminf_export.export.passes.declare_inputs_and_outputs import DeclareInputsAndOutputsPass
from lminf_export.export.passes.describe_model import DescribeModelPass
from lminf_export.export.tokenizer_files import copy_present, copy_tokenizer
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import as_integer
from lminf_export.progress import Progress, silent
from lminf_export.rewriting.assembling import assemble
from lminf_export.rewriting.check import check_rewrite
from lminf_export.rewriting.finding import FoundGraph, find_in_graph
from lminf_export.rewriting.job import RewriteJob, training_length
from lminf_export.rewriting.opset import to_opset
from lminf_export.rewriting.options import REWRITE_OPTIONS, check_options
from lminf_export.rewriting.original import run_original
from lminf_export.rewriting.parts import weight_files
from lminf_export.rewriting.planning import plan_layers
from lminf_export.rewriting.reading import following
from lminf_export.rewriting.rows import attach_bodies
from lminf_export.rewriting.searching import MICROSOFT
from lminf_export.rewriting.source import OnnxSource, configured_plan, open_onnx
from lminf_export.rewriting.tuning import tune
from lminf_export.tensors.link import link_file

logger = logging.getLogger(__name__)
_NO_FILES = "the weights are in the graph itself, which is written anew: nothing is linked"


def rewrite(
    model: str | Path, out: str | Path, *, progress: Progress = silent, **options: Any
) -> Bundle:
    """Rewrite an ONNX language model of another tool so that it decodes a stream without end.

    Its attentions become Λ-attention over bounded caches; all else, quantised weights among it,
    stays as it is.

    Args:
        model: the graph's file, or the folder that holds it.
        out: the bundle's folder, or DIR/NAME.plan or DIR/NAME.onnx for a bundle DIR with that
            as its last product.
        progress: called with the phase that runs.
        options: fields of `ExportOptions`, by their names, that mean something for a finished
            graph; the signature lists them.

    Returns:
        The written bundle.

    Raises:
        TypeError: an option of an unknown name.
        LminfError: in one line the expected, the found and the remedy; nothing is left behind.
    """
    unknown = sorted(options.keys() - set(REWRITE_OPTIONS))
    if unknown:
        raise TypeError(f"rewrite() got an unexpected keyword argument {unknown[0]!r}")
    return run_job(prepare(ExportOptions(model, out, **options), progress), progress)


# Read by inspect.
rewrite.__signature__ = signature_with_options(  # type: ignore[attr-defined]
    rewrite, REWRITE_OPTIONS
)


def prepare(options: ExportOptions, progress: Progress = silent) -> RewriteJob:
    """Check every setting and the graph, and decide all that is left open; write nothing.

    Raises:
        LminfError: as `rewrite`.
    """
    check_options(options)
    target = out_target(options)
    builder, plugin = choose_builder(options, target)
    check_weights(options.weights, None)
    as_integer("max_batch_size", options.max_batch_size, 1)
    options.lambda_config(1 if options.window_size is None else options.window_size)
    check_destination(target.directory, force=options.force)  # before the work
    progress("reading the model", None)
    source = open_onnx(options.model, options.tokenizer)
    with following(source.path):
        found = find_in_graph(source.path, source.head_dim, progress)
    trained = training_length(source, found)
    window, notices = default_window(options.window_size, trained)
    settings = options.lambda_config(window)
    known = configured_plan(source, settings, notices)
    plan = plan_layers(found.layers, settings, known)
    short_plan = None
    if plan.is_of_long:
        short = replace(settings, rope_regime="short")
        short_plan = plan_layers(found.layers, short, configured_plan(source, short, []))
    contract = GraphContract(plan.attention.layers, found.dtype, None, found.vocab_size)
    batch_size = options.max_batch_size if target.engine_name else 1
    check_cache_size(contract, settings, batch_size, trained)
    notices += [*source.notices, *plan.attention.notices]
    notices += plugin_notices(builder, options, plan.attention)
    notices += _file_notices(options, source, found)
    notices += memory_notices(contract, settings)
    notices += _engine_notices(builder, found)
    job = RewriteJob(
        options=options,
        source=source,
        found=found,
        settings=settings,
        plan=plan,
        short_plan=short_plan,
        target=target,
        builder=builder,
        plugin=plugin,
        training_length=trained,
        notices=tuple(notices),
    )
    job.manifest()  # what the files get wrong shows here, not after the work
    return job


def _file_notices(options: ExportOptions, source: OnnxSource, found: FoundGraph) -> Iterable[str]:
    """Say what linking the weights means, and what other files contradict."""
    if options.weights == LINK:
        yield LINK_NOTICE if weight_files(found.model) else _NO_FILES
    if source.vocab_size not in (None, found.vocab_size):
        yield (
            f"the graph scores {found.vocab_size} tokens and config.json has a vocabulary of "
            f"{source.vocab_size}; the graph's is kept: are configuration and tokenizer this "
            f"model's?"
        )


def _engine_notices(builder: str | None, found: FoundGraph) -> Iterable[str]:
    """Say what an engine's builder elsewhere may refuse; one that runs here says it itself."""
    if builder != ELSEWHERE:
        return
    replaced = {layer.anchor.node for layer in found.layers}
    kinds = {n.op_type for n in found.model.graph if n.domain == MICROSOFT and n not in replaced}
    if kinds := kinds - {"RotaryEmbedding"}:
        yield (
            f"the graph has operators of onnxruntime's own, which TensorRT takes only where its "
            f"parser knows them: {', '.join(sorted(kinds))}"
        )


def run_job(job: RewriteJob, progress: Progress = silent) -> Bundle:
    """Write the bundle of a prepared job; the job is used up.

    Raises:
        LminfError: as `rewrite`.
    """
    with BundleWriter(job.target.directory, force=job.options.force) as writer:
        writer.require_space(0 if job.links_weights else job.weight_bytes)
        notices = _copy_texts(job, writer)
        original = None
        if job.options.check:
            progress("running the original", None)
            original = run_original(job)
            notices += original.notices
        progress("rewriting", None)
        graph = _write_graph(job, writer)
        _put_weights(job, writer, progress)
        check_graph_file(graph)
        if original is not None:
            progress("checking the graph", None)
            notices += check_rewrite(job, graph.parent, original)
        license = copy_license_files(job.source.texts, writer)
        engine, recipe = add_engine(job, writer, graph, progress)
        progress("hashing", None)
        draft = job.manifest(engine, recipe, notices)
        linked = tuple(_names(job)) if job.links_weights else ()
        manifest = writer.commit(draft.model_copy(update={"linked_files": linked}), license=license)
    for notice in manifest.notices:
        logger.warning(notice)
    return Bundle.open(job.target.directory)


def _write_graph(job: RewriteJob, writer: BundleWriter) -> Path:
    with following(job.source.path):
        assembled = assemble(job.found, job.plan, job.contract)
        tune(job.found.model, assembled)
        model = to_opset(job.found.model)
        attach_bodies(model)
        features = body_features(job.plan.attention, int8_cache=False)
        steps = (
            DescribeModelPass(job.metadata()),
            AttachAttentionBodyPass(features),
            DeclareInputsAndOutputsPass(job.contract.inputs(), job.contract.outputs()),
        )
        pipelines.run(model, steps)
    path = writer.add(job.target.graph_name, "graph")
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            tensor._base_dir = path.parent  # the same files, in the bundle
    ir.save(model, path)
    return path


def _names(job: RewriteJob) -> list[str]:
    return [path.relative_to(job.source.folder).as_posix() for path in job.weight_files]


def _put_weights(job: RewriteJob, writer: BundleWriter, progress: Progress) -> None:
    """Copy or link the files of weights that the new graph still reads."""
    progress("linking weights" if job.links_weights else "copying weights", None)
    for name, path in zip(_names(job), job.weight_files, strict=True):
        put = link_file if job.links_weights else copy_file
        put(path, writer.add(name, "weights"))


def _copy_texts(job: RewriteJob, writer: BundleWriter) -> list[str]:
    """Copy tokenizer, chat templates and configuration; return notices."""
    if job.source.source is not None:
        copy_present(job.source.source.folder, CONFIG_FILES, writer, "config")
    return copy_tokenizer(job.source.texts, writer, trust_remote_code=False)
