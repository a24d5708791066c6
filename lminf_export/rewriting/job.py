"""A rewrite as it is decided before a byte is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lminf_export.bundle.manifest import Manifest, new_manifest
from lminf_export.bundle.out import OutTarget
from lminf_export.bundle.records import Engine, EngineRecipe, SourceRecord
from lminf_export.bundle.versions import package_version
from lminf_export.errors import ModelError
from lminf_export.export.job import TOOLS, graph_metadata
from lminf_export.export.options import LINK, ExportOptions
from lminf_export.export.tokenizer_files import bos_id, eos_ids
from lminf_export.models.registry import family_of
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import LambdaConfig, as_integer
from lminf_export.rewriting.finding import FoundGraph
from lminf_export.rewriting.parts import weight_files
from lminf_export.rewriting.planning import RewritePlan
from lminf_export.rewriting.source import OnnxSource


@dataclass(frozen=True)
class RewriteJob:
    """Everything decided before anything is written.

    Attributes:
        options: what was asked for.
        source: the model on disk.
        found: its graph, and what is in it.
        settings: Λ settings, defaults filled in.
        plan: how every layer will attend.
        short_plan: the same by the rotation that the original has for short texts, where `plan` has
            that of long ones; else None.
        target: where the bundle goes.
        builder: the engine's builder, "none" for a build elsewhere, or None for no engine.
        plugin: library of the plugin the engine is made with, if there is one.
        training_length: of the model, where it is known.
        notices: what the user should know.
    """

    options: ExportOptions
    source: OnnxSource
    found: FoundGraph
    settings: LambdaConfig
    plan: RewritePlan
    short_plan: RewritePlan | None
    target: OutTarget
    builder: str | None
    plugin: Path | None
    training_length: int | None
    notices: tuple[str, ...]

    @property
    def contract(self) -> GraphContract:
        """The graph's inputs and outputs, and its caches."""
        layers = self.plan.attention.layers
        return GraphContract(layers, self.found.dtype, None, self.found.vocab_size)

    @property
    def links_weights(self) -> bool:
        """Whether the bundle gets hard links to the model's weights."""
        return self.options.weights == LINK and bool(self.weight_files)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the graph's weights, beside the graph itself."""
        return tuple(self.source.folder / name for name in weight_files(self.found.model))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in files beside the graph."""
        return sum(path.stat().st_size for path in self.weight_files)

    def manifest(
        self,
        engine: Engine | None = None,
        recipe: EngineRecipe | None = None,
        notices: Iterable[str] = (),
    ) -> Manifest:
        """Return the bundle's manifest, before its files are known."""
        attention = self.plan.attention
        origin = self.found.origin.model_copy(update={"compared": self.options.check})
        return new_manifest(
            model_type=self.source.model_type,
            source=SourceRecord(name=self.source.name, rewritten=origin),
            settings=self.settings,
            contract=self.contract,
            num_attention_heads=attention.num_attention_heads,
            layer_kinds=["sliding" if own else "lambda" for own in attention.sliding],
            graph=self.target.graph_name,
            training_length=self.training_length,
            bos_token_id=self._bos_id(),
            eos_token_ids=self._eos_ids(),
            tools={name: package_version(name) for name in TOOLS},
            notices=(*self.notices, *notices),
            engine=engine,
            engine_recipe=recipe,
        )

    def metadata(self) -> dict[str, str]:
        """Return the essentials of the manifest as ONNX metadata_props."""
        return graph_metadata(
            model_type=self.source.model_type,
            source=self.source.name,
            dtype=self.found.dtype,
            settings=self.settings,
            layers=self.plan.attention.layers,
        )

    def _bos_id(self) -> int | None:
        if self.source.source is not None:
            return bos_id(self.source.source.config)
        token = self.source.genai.get("model", {}).get("bos_token_id")
        return None if token is None else as_integer("bos_token_id", token, 0, ModelError)

    def _eos_ids(self) -> list[int]:
        if self.source.source is not None:
            ids = eos_ids(self.source.source)
        else:
            found = self.source.genai.get("model", {}).get("eos_token_id")
            listed = found if isinstance(found, list) else [] if found is None else [found]
            ids = [as_integer("eos_token_id", token, 0, ModelError) for token in listed]
        return [token for token in ids if token < self.found.vocab_size]


def training_length(source: OnnxSource, found: FoundGraph) -> int | None:
    """Return the length that a model was trained on, where its files or its graph say it."""
    if source.source is not None:
        config = source.source.config
        known = family_of(config).training_length(config)
        if known is not None:
            return known
    # Where a graph rotates long texts otherwise, short ones are of the training's length.
    turnings = [layer.measured.turning for layer in found.layers]
    lengths = [turning.switch for turning in turnings if turning and turning.switch]
    if source.context_length is not None:
        lengths.append(source.context_length)
    return min(lengths, default=None)
