"""An export as it is decided before a byte is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from lminf_export.bundle.manifest import Manifest, new_manifest
from lminf_export.bundle.out import OutTarget
from lminf_export.bundle.records import Engine, EngineRecipe, Quantization, SourceRecord
from lminf_export.bundle.versions import package_version
from lminf_export.checkpoint.opening import Checkpoint
from lminf_export.checkpoint.source import Source
from lminf_export.export.options import LINK, ExportOptions
from lminf_export.export.tokenizer_files import bos_id, eos_ids
from lminf_export.models.base import AttentionPlan, Family
from lminf_export.operator.bindings import LayerSpec
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import (
    Dtype,
    KvCacheDtype,
    LambdaConfig,
)
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.quantize.estimate import kept_bytes, weight_bytes
from lminf_export.quantize.kept import kept_type
from lminf_export.tensors.dtypes import item_size

TOOLS = ("lminf-export", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def graph_metadata(
    *,
    model_type: str,
    source: str,
    dtype: str,
    settings: LambdaConfig,
    layers: Sequence[LayerSpec],
    more: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """Return the essentials of a manifest as ONNX metadata_props."""
    return {
        "lminf_export": package_version("lminf-export"),
        "lminf.model_type": model_type,
        "lminf.source": source,
        "lminf.dtype": dtype,
        **more,
        "lminf.window_size": str(settings.window_size),
        "lminf.num_sink_tokens": str(settings.num_sink_tokens),
        "lminf.distance_limit": str(settings.distance_limit),
        "lminf.chunk_size": str(settings.chunk_size),
        "lminf.layers": json.dumps([vars(layer) for layer in layers]),
    }


@dataclass(frozen=True)
class ExportJob:
    """Everything decided before anything is written.

    Attributes:
        options: what was asked for.
        source: the model on disk.
        family: its adapter.
        settings: Λ settings, defaults filled in.
        plan: how every layer attends.
        dtype: element type of weights and caches.
        quantize: how weights are quantised, None for not at all.
        kv_cache_dtype: element type of the rings where it is not dtype, else None.
        target: where the bundle goes.
        builder: the engine's builder, "none" for a build elsewhere, or None for no engine.
        plugin: library of the plugin the engine is made with, if there is one.
        checkpoint: the source's tensors, decoded, an adapter merged.
        notices: what the user should know.
    """

    options: ExportOptions
    source: Source
    family: Family
    settings: LambdaConfig
    plan: AttentionPlan
    dtype: Dtype
    quantize: QuantizeConfig | None
    kv_cache_dtype: KvCacheDtype | None
    target: OutTarget
    builder: str | None
    plugin: Path | None
    checkpoint: Checkpoint
    notices: tuple[str, ...]

    @property
    def contract(self) -> GraphContract:
        """The graph's inputs and outputs, and its caches."""
        vocab_size = self.source.config.vocab_size
        return GraphContract(self.plan.layers, self.dtype, self.kv_cache_dtype, vocab_size)

    @property
    def links_weights(self) -> bool:
        """Whether the bundle gets hard links to the source's weights."""
        return self.options.weights == LINK

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in the bundle; an estimate where they are quantised."""
        width, config = item_size(self.dtype), self.quantize
        keeps = config is not None and config.source_blocks == "keep" and config.form != "qdq"
        shapes, kept = [], 0
        for tensor in self.checkpoint.tensors.values():
            kind = kept_type(tensor) if keeps else None
            if kind is None:
                shapes.append(tensor.shape)
            else:
                kept += kept_bytes(tensor.shape, kind, width)
        return kept + weight_bytes(shapes, width, self.source.config.vocab_size, config)

    def manifest(
        self,
        engine: Engine | None = None,
        recipe: EngineRecipe | None = None,
        notices: Iterable[str] = (),
    ) -> Manifest:
        """Return the bundle's manifest, before its files are known."""
        config = self.source.config
        return new_manifest(
            model_type=self.source.model_type,
            source=SourceRecord(
                name=self.source.name,
                revision=self.source.revision,
                adapter=self.checkpoint.adapter,
                wrapper=self.source.wrapper,
            ),
            settings=self.settings,
            contract=self.contract,
            quantization=self._quantization(),
            num_attention_heads=self.plan.num_attention_heads,
            layer_kinds=["sliding" if own else "lambda" for own in self.plan.sliding],
            graph=self.target.graph_name,
            training_length=self.family.training_length(config),
            bos_token_id=bos_id(config),
            eos_token_ids=eos_ids(self.source),
            tools={name: package_version(name) for name in TOOLS},
            notices=(*self.notices, *notices),
            engine=engine,
            engine_recipe=recipe,
        )

    def _quantization(self) -> Quantization | None:
        """Return the manifest's record of the settings, without the single weights."""
        if self.quantize is None:
            return None
        symmetric = self.quantize.is_symmetric(self.quantize.weights)
        return Quantization(**{**asdict(self.quantize), "symmetric": symmetric})
