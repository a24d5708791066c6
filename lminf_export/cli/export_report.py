"""The words of `lminf-export` about what it wrote, or would write."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from lminf_export.bundle.files import human_bytes
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.manifest import Manifest
from lminf_export.bundle.records import BUILD_SCRIPT_NAME, MANIFEST_NAME, EngineRecipe
from lminf_export.engine.options import ELSEWHERE
from lminf_export.engine.plugin import PLUGIN_FILE
from lminf_export.export.job import ExportJob
from lminf_export.rewriting.job import RewriteJob
from lminf_export.verify.perplexity_cost import PerplexityCost

_SHOWN_ROLES = ("graph", "weights", "plan", "plugin", "engine_graph")


@dataclass(frozen=True)
class PlanReport:
    """A dry run's result."""

    job: ExportJob | RewriteJob

    def print(self) -> None:
        """Print what would be written."""
        job, draft = self.job, self.job.manifest()
        settings, cache = job.settings, human_bytes(draft.cache_bytes_per_sequence)
        rows = [
            ("model", f"{draft.model_type} from {draft.source.name}, {len(draft.layers)} layers"),
            *(
                [("text part of", f"a {wrapper} model")]
                if (wrapper := draft.source.wrapper)
                else []
            ),
            *([("rewritten", origin.description)] if (origin := draft.source.rewritten) else []),
            *([("adapter", draft.source.adapter)] if draft.source.adapter else []),
            ("bundle", str(job.target.directory)),
            ("graph", job.target.graph_name),
            ("engine", _engine_plan(job)),
            ("element type", draft.dtype),
            ("quantised", draft.quantised),
            ("weights", self._weights(draft)),
            ("window", f"{settings.window_size} tokens, chunks of {settings.chunk_size}"),
            ("sink tokens", f"{settings.num_sink_tokens}, at distance {settings.distance_limit}"),
            ("cache", f"{_kind_of_cache(draft)}{cache} per sequence, without end"),
        ]
        for name, value in rows:
            click.echo(f"{name:13} {value}")
        notes = [
            *draft.notices,
            *(["a bundle is there already; --force replaces it"] if self._is_there else []),
        ]
        for notice in notes:
            click.echo(f"{'note':13} {notice}")
        click.echo("dry run: nothing was written")

    def to_dict(self) -> dict[str, Any]:
        """Return the same as JSON can hold it."""
        job, draft = self.job, self.job.manifest()
        return {
            "dry_run": True,
            "bundle": str(job.target.directory),
            "exists": self._is_there,
            "engine_file": job.target.engine_name,
            "engine_builder": job.builder,
            "weight_bytes": job.weight_bytes,
            "cache_bytes_per_sequence": draft.cache_bytes_per_sequence,
            "notices": list(draft.notices),
            "manifest": draft.model_dump(mode="json"),
        }

    def _weights(self, draft: Manifest) -> str:
        """Return the bytes of the weights in words; a foreign graph may hold them itself."""
        if draft.source.rewritten is not None and not self.job.weight_bytes:
            return "in the graph"
        return ("about " if draft.quantization else "") + human_bytes(self.job.weight_bytes)

    @property
    def _is_there(self) -> bool:
        """Whether an export to that place has something to replace."""
        return os.path.lexists(self.job.target.directory / MANIFEST_NAME)


@dataclass(frozen=True)
class ExportReport:
    """An export's result."""

    bundle: Bundle
    cost: PerplexityCost | None = None

    def print(self) -> None:
        """Print what was written and what to do with it."""
        manifest = self.bundle.manifest
        settings = manifest.settings
        quantized = f" and {manifest.quantization.weights}" if manifest.quantization else ""
        wrapper = manifest.source.wrapper
        kind = f"{manifest.model_type}{f' of a {wrapper} model' if wrapper else ''}"
        click.echo(
            f"{_shown(self.bundle.path)}: {kind}, {manifest.dtype}{quantized}, "
            f"window {settings.window_size} + {settings.num_sink_tokens} sink tokens, cache "
            f"{_kind_of_cache(manifest)}{human_bytes(manifest.cache_bytes_per_sequence)} per "
            "sequence, without end"
        )
        for name, entry in manifest.files.items():
            if entry.role in _SHOWN_ROLES:
                click.echo(f"  {name:20} {human_bytes(entry.bytes):>10}")
        if (engine := manifest.engine) is not None:
            made_by = f"{engine.builder} {engine.version} for {engine.target}"
            click.echo(f"engine: {made_by}, {engine.note}")
        if manifest.engine_recipe is not None:
            self._print_recipe(manifest.engine_recipe)
        if (cost := self.cost) is not None:
            click.echo(
                f"perplexity of the text's first {cost.tokens} predictions: {cost.quantized:.3f}, "
                f"without quantisation {cost.unquantized:.3f} ({cost.cost:+.2%} ± "
                f"{cost.standard_error:.2%})"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the same as JSON can hold it."""
        manifest = self.bundle.manifest
        return {
            "dry_run": False,
            "bundle": str(self.bundle.path),
            "cache_bytes_per_sequence": manifest.cache_bytes_per_sequence,
            "notices": list(manifest.notices),
            "manifest": manifest.model_dump(mode="json"),
            **({"perplexity_cost": asdict(self.cost)} if self.cost is not None else {}),
        }

    def _print_recipe(self, recipe: EngineRecipe) -> None:
        """Say which script builds the plan with TensorRT's own command, and what comes then."""
        if BUILD_SCRIPT_NAME not in self.bundle.manifest.files:
            return  # a notice says why trtexec cannot build it
        built, folder = self.bundle.manifest.engine is not None, _shown(self.bundle.path)
        script = shlex.join(["sh", str(folder / BUILD_SCRIPT_NAME)])
        click.echo(f"{'the same engine, built by hand' if built else 'build the engine'}: {script}")
        if built:
            return
        if recipe.needs_plugin and not self.bundle.manifest.files_of("plugin"):
            click.echo(f"with {PLUGIN_FILE} in that folder (docs/engines.md says how to build it)")
        words = ["lminf", "add-plan", str(folder), str(folder / recipe.file), "--target", "sm_XX"]
        click.echo(f"then register it there: {shlex.join(words)}")


def _kind_of_cache(manifest: Manifest) -> str:
    return f"{manifest.kv_cache_dtype}, " if manifest.kv_cache_dtype else ""


def _engine_plan(job: ExportJob | RewriteJob) -> str:
    if job.builder is None:
        return "none"
    if job.builder == ELSEWHERE:
        return f"{job.target.engine_name}, to be built elsewhere"
    return f"{job.target.engine_name} by {job.builder}" + (" with its plugin" if job.plugin else "")


def _shown(path: Path) -> Path:
    """Return a path relative to where the user is, if it is below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
