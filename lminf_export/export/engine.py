"""The engine of an export: which builder and plugin, and building it or writing its recipe."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from lminf_export.bundle.out import OutTarget, parse_out
from lminf_export.bundle.records import BUILD_SCRIPT_NAME, Engine, EngineRecipe
from lminf_export.bundle.writer import BundleWriter
from lminf_export.engine.builders import (
    ENGINE_GRAPH_NAME,
    build_engine,
    check_options,
    has_recipe,
    require_machine,
    select_builder,
    uses_plugin,
)
from lminf_export.engine.common import EngineRequest
from lminf_export.engine.options import ELSEWHERE
from lminf_export.engine.plugin import PLUGIN_FILE, find_plugin, head_dim_problem
from lminf_export.engine.recipe import make_recipe, trtexec_script
from lminf_export.errors import ConfigError, EngineError
from lminf_export.export.engine_graph import write_engine_graph
from lminf_export.export.options import ExportOptions
from lminf_export.models.base import AttentionPlan
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import AUTO_KV_CACHE_DTYPE, LambdaConfig
from lminf_export.progress import Progress

DEFAULT_ENGINE_NAME = "engine.plan"


class EngineJob(Protocol):
    """An export or a rewrite, as far as its engine needs it."""

    @property
    def options(self) -> ExportOptions:
        """See `ExportJob.options`."""
        ...

    @property
    def target(self) -> OutTarget:
        """See `ExportJob.target`."""
        ...

    @property
    def settings(self) -> LambdaConfig:
        """See `ExportJob.settings`."""
        ...

    @property
    def contract(self) -> GraphContract:
        """See `ExportJob.contract`."""
        ...

    @property
    def builder(self) -> str | None:
        """See `ExportJob.builder`."""
        ...

    @property
    def plugin(self) -> Path | None:
        """See `ExportJob.plugin`."""
        ...


def out_target(options: ExportOptions) -> OutTarget:
    """Return where the bundle goes; for a build elsewhere a plan needs no name of the user's."""
    target = parse_out(options.out)
    if options.builder == ELSEWHERE and target.engine_name is None:
        return replace(target, engine_name=DEFAULT_ENGINE_NAME)
    return target


def choose_builder(options: ExportOptions, target: OutTarget) -> tuple[str | None, Path | None]:
    """Return the engine's builder and the library of its plugin, both None if not needed."""
    asked = options.builder_settings
    if target.engine_name is None:
        useless = ["builder"] if options.builder is not None else list(asked.asked_for)
        if useless:
            raise ConfigError(
                f"{useless[0]}: no engine is asked for; name one, such as "
                f"--out {target.directory / 'engine.plan'}"
            )
        return None, None
    builder = select_builder(options.builder)
    check_options(builder, asked)
    require_machine(builder)
    if not uses_plugin(builder, asked):
        return builder, None
    int8_cache = options.kv_cache_dtype != AUTO_KV_CACHE_DTYPE
    return builder, find_plugin(asked, required=builder != ELSEWHERE, int8_cache=int8_cache)


def check_rings(kv_cache_dtype: str | None, builder: str | None, options: ExportOptions) -> None:
    """Refuse an engine of standard operators with rings that are not of the model's type.

    Raises:
        ConfigError: with the reason, in the builder's words.
    """
    if kv_cache_dtype is None or builder is None:
        return
    if not uses_plugin(builder, options.builder_settings):
        raise ConfigError(
            f"kv_cache_dtype={kv_cache_dtype!r}: needs the plugin (--builder tensorrt or none): "
            "TensorRT's own cache update refuses it (\"cache has type Int8 but must have type "
            'Float, Half, or BFloat16"), other updates copy the ring; leave it out'
        )


def plugin_notices(
    builder: str | None, options: ExportOptions, plan: AttentionPlan
) -> Iterable[str]:
    """Refuse layers the plugin cannot run; where nothing is built here, say so."""
    if builder is None or not uses_plugin(builder, options.builder_settings):
        return
    problem = head_dim_problem(plan.layers)
    if problem is None:
        return
    if builder != ELSEWHERE:
        raise EngineError(problem)
    yield f"TensorRT will refuse this graph: {problem}"


def add_engine(
    job: EngineJob, writer: BundleWriter, graph: Path, progress: Progress
) -> tuple[Engine | None, EngineRecipe | None]:
    """Prepare the engine's graph and build the engine, or say how it is built elsewhere.

    Args:
        job: whose engine.
        writer: of the bundle; the plan and what builds it are announced to it.
        graph: the exported graph.
        progress: receives the phase that runs.

    Raises:
        EngineError: the graph cannot be prepared, or naming what the builder refused.
    """
    if job.builder is None or job.target.engine_name is None:
        return None, None
    plugin = _copy_plugin(job, writer)
    with _graph_place(job.builder, writer, graph) as onnx_path:
        request = EngineRequest(
            onnx_path=onnx_path,
            # Announced to the writer only if it is built here.
            plan_path=graph.with_name(job.target.engine_name),
            contract=job.contract,
            chunk_size=job.settings.chunk_size,
            max_batch_size=job.options.max_batch_size,
            with_plugin=uses_plugin(job.builder, job.options.builder_settings),
            plugin_path=plugin,
            options=job.options.builder_settings,
        )
        progress("preparing the graph", None)
        write_engine_graph(graph, request)
        recipe = make_recipe(request) if has_recipe(job.builder) else None
        if recipe is not None and not (
            recipe.needs_plugin and head_dim_problem(job.contract.layers)
        ):
            _write_script(writer, recipe)
        if job.builder == ELSEWHERE:
            return None, recipe
        writer.add(job.target.engine_name, "plan")
        return build_engine(job.builder, request, progress), recipe


def _write_script(writer: BundleWriter, recipe: EngineRecipe) -> None:
    path = writer.add(BUILD_SCRIPT_NAME, "other")
    path.write_text(trtexec_script(recipe), encoding="utf-8")
    # Whoever may read it may run it.
    mode = path.stat().st_mode
    path.chmod(mode | (mode & 0o444) >> 2)


@contextmanager
def _graph_place(builder: str, writer: BundleWriter, graph: Path) -> Iterator[Path]:
    """Yield where the engine's graph goes, beside the weights; it stays if a recipe needs it."""
    if has_recipe(builder):
        yield writer.add(ENGINE_GRAPH_NAME, "engine_graph")
        return
    scratch = graph.with_name(f".{graph.stem}.{os.getpid()}.{time.monotonic_ns()}.onnx")
    try:
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def _copy_plugin(job: EngineJob, writer: BundleWriter) -> Path | None:
    """Put the plugin's library into the bundle: what the plan is built with is what it loads."""
    if job.plugin is None:
        return None
    path = writer.add(PLUGIN_FILE, "plugin")
    shutil.copyfile(job.plugin, path)
    return path
