"""An ONNX model on this machine's disk: its graph, and the files that say what it means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lminf_export.bundle.files import require_utf8
from lminf_export.checkpoint.links import refuse_links_to_outside
from lminf_export.checkpoint.source import Source, open_source
from lminf_export.disk import is_dir, is_file, read_json, user_path
from lminf_export.errors import ModelError, shortened
from lminf_export.export.tokenizer_check import VOCABULARIES
from lminf_export.models.base import AttentionPlan
from lminf_export.models.registry import family_of
from lminf_export.operator.settings import LambdaConfig, as_integer
from lminf_export.rewriting.detecting import find_onnx_model

GENAI_CONFIG = "genai_config.json"
# transformers.js keeps graphs in a folder of this name below the configuration.
_GRAPHS_FOLDER = "onnx"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class OnnxSource:
    """An ONNX model.

    Attributes:
        path: the graph's file.
        name: of the model: its folder's.
        source: its configuration, None where there is none that can be used.
        genai: `genai_config.json` of onnxruntime-genai, {} without one.
        texts: the folder with the tokenizer.
        notices: what the user should know.
    """

    path: Path
    name: str
    source: Source | None
    genai: dict[str, Any]
    texts: Path
    notices: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder of the graph and its weights."""
        return self.path.parent

    @property
    def model_type(self) -> str:
        """transformers' or onnxruntime-genai's name of the family, or "onnx"."""
        if self.source is not None:
            return self.source.model_type
        kind = self.genai.get("model", {}).get("type")
        return kind if isinstance(kind, str) and kind else "onnx"

    @property
    def head_dim(self) -> int | None:
        """D, as the files beside the graph say."""
        found = self.genai.get("model", {}).get("decoder", {}).get("head_size")
        if found is None and self.source is not None:
            config = self.source.config
            found = getattr(config, "head_dim", None) or (
                config.hidden_size // config.num_attention_heads
            )
        return None if found is None else as_integer("head_size", found, 1, ModelError)

    @property
    def vocab_size(self) -> int | None:
        """V, as config.json says."""
        found = None if self.source is None else getattr(self.source.config, "vocab_size", None)
        return found if isinstance(found, int) else None

    @property
    def context_length(self) -> int | None:
        """Tokens that onnxruntime-genai lets a text have."""
        found = self.genai.get("model", {}).get("context_length")
        return None if found is None else as_integer("context_length", found, 1, ModelError)


def open_onnx(model: str | Path, tokenizer: str | Path | None) -> OnnxSource:
    """Find an ONNX model and the files that belong to it.

    Args:
        model: the graph's file, or the folder that holds it.
        tokenizer: folder with tokenizer and configuration, where they are not beside the graph.

    Raises:
        ModelError: a file is missing or cannot be read.
    """
    path = find_onnx_model(model)
    if path is None:
        raise ModelError(f"model {shortened(repr(str(model)))} is no ONNX model")
    require_utf8(path, ModelError)
    above = path.parent.parent if path.parent.resolve().name == _GRAPHS_FOLDER else path.parent
    folders = [path.parent, above]
    if tokenizer is not None:
        folder = user_path(tokenizer, ModelError)
        if not is_dir(folder):
            raise ModelError(
                f"tokenizer {shortened(repr(str(tokenizer)))} is no folder; give the one that "
                f"holds tokenizer.json"
            )
        if not any(is_file(folder / name) for name in ("config.json", *_TOKENIZERS, *VOCABULARIES)):
            raise ModelError(
                f"tokenizer {shortened(repr(str(tokenizer)))} holds no tokenizer and no "
                f"config.json; give the folder that holds tokenizer.json"
            )
        folders.insert(0, folder)
    for folder in dict.fromkeys(folders):
        refuse_links_to_outside(folder)
    notices: list[str] = []
    texts = _first_with(folders, _TOKENIZERS) or path.parent
    configured = _first_with(folders, ("config.json",))
    source = None if configured is None else _source(configured, notices)
    genai: dict[str, Any] = {}
    if is_file(path.parent / GENAI_CONFIG):
        content = read_json(path.parent / GENAI_CONFIG, ModelError, GENAI_CONFIG)
        genai = content if isinstance(content, dict) else {}
        for name, part in (("model", genai), ("decoder", genai.get("model", {}))):
            if not isinstance(part.get(name, {}), dict):
                raise ModelError(f"{GENAI_CONFIG} is damaged: its {name} is no table")
    return OnnxSource(path, above.resolve().name, source, genai, texts, tuple(notices))


def configured_plan(
    source: OnnxSource, settings: LambdaConfig, notices: list[str]
) -> AttentionPlan | None:
    """Return how the layers attend by the configuration, None where it does not say.

    Args:
        source: the model.
        settings: of Λ-attention.
        notices: why a configuration does not say it is added to them.
    """
    if source.source is None:
        return None
    config = source.source.config
    try:
        return family_of(config).plan(config, settings)
    except ModelError as error:
        notices.append(f"config.json is not compared with the graph: {error}")
        return None


def _first_with(folders: list[Path], names: tuple[str, ...]) -> Path | None:
    return next((f for f in folders if any(is_file(f / name) for name in names)), None)


def _source(folder: Path, notices: list[str]) -> Source | None:
    """Return the configuration; one that cannot be used is left out, since the graph has it all."""
    try:
        return open_source(folder)
    except ModelError as error:
        notices.append(f"config.json is not compared with the graph: {error}")
        return None
