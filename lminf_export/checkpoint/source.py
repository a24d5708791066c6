"""Where a model comes from: a local folder or a hub id, its configuration and its tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lminf_export.bundle.files import require_utf8
from lminf_export.bundle.hub_errors import hub_errors_as
from lminf_export.bundle.versions import package_version
from lminf_export.checkpoint.config_file import read_config_file
from lminf_export.checkpoint.dequantize.methods import check_quantization
from lminf_export.checkpoint.gguf.files import SUFFIX, gguf_parts
from lminf_export.checkpoint.gguf.folder import GgufFolder, open_gguf
from lminf_export.checkpoint.links import refuse_links_to_outside
from lminf_export.checkpoint.quantization_file import (
    MODELOPT_FILE,
    QUANTIZATION,
    quantization_of,
)
from lminf_export.checkpoint.text_part import TextPart, find_text_part
from lminf_export.disk import exists, is_file, user_path
from lminf_export.errors import ModelError, shortened
from lminf_export.models.base import model_errors
from lminf_export.models.kinds import SEE_FAMILIES, check_kind
from lminf_export.models.remote_code import allow_code, runs_own_code
from lminf_export.models.transformers_tables import CODE_ERRORS, causal_lm_name, is_known
from lminf_export.models.wrappers import text_config_of

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
# Python of a repository, fetched only where it may run.
CODE_PATTERNS = ("*.py",)
PICKLE_PATTERNS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
# Copied into the bundle where they exist.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tiktoken.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Converted at the export, and not copied.
TIKTOKEN_PATTERN = "*.tiktoken"
EXTRA_TEMPLATES = "additional_chat_templates/*.jinja"
CONFIG_FILES = ("config.json", "generation_config.json")
# The licence is copied, and looked up in the card.
_ONNX_SUFFIX = ".onnx"
LICENSE_PATTERNS = ("README.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Source:
    """A model on this machine's disk.

    Attributes:
        folder: where its files are.
        name: hub id, or the folder's own name; never a path of this machine.
        revision: commit of the hub, or None for a folder.
        config: the model's configuration as transformers reads it, of the unquantised model; of a
            multimodal model, that of its text model.
        quantization: how its checkpoint is quantised, checked, or None.
        is_untied: config.json ties its embeddings; its tensors, of which there are two, are not.
        text_part: the text model in the multimodal model of the folder; None for a text model.
        gguf: its GGUF files, which have the weights; `folder` is then made of their metadata.
        named: the model type in config.json, where it is another name of that of `config`.
    """

    folder: Path
    name: str
    revision: str | None
    config: Any
    quantization: dict[str, Any] | None = None
    is_untied: bool = False
    text_part: TextPart | None = None
    gguf: GgufFolder | None = None
    named: str | None = None

    @property
    def wrapper(self) -> str | None:
        """transformers' name of the multimodal model whose text model it is, if it is one."""
        return None if self.text_part is None else self.text_part.model_type

    @property
    def model_type(self) -> str:
        """transformers' name of the family."""
        return self.config.model_type


def open_source(
    model: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Source:
    """Find a model; an id that is no folder here is fetched from the Hugging Face hub.

    Args:
        model: folder, GGUF file, or hub id such as "meta-llama/Llama-2-7b-hf".
        revision: branch, tag or commit of the hub.
        cache_dir: where the hub's files are kept.
        trust_remote_code: run Python that a model repository brings; off by default.
        allow_pickle: fetch `.bin` weights too.

    Raises:
        ModelError: the model is not there, not readable, or not a language model.
    """
    folder = user_path(model, ModelError)
    require_utf8(folder, ModelError)
    commit, gguf = None, None
    if exists(folder):
        if revision is not None:
            raise ModelError(
                f"--revision {revision} is for hub models; {str(model)!r} is on this machine"
            )
        name = folder.resolve().name
        if parts := gguf_parts(folder):
            gguf = open_gguf(parts)
            folder, name = gguf.path, gguf.gguf.name
        elif is_file(folder) and folder.suffix.lower() == _ONNX_SUFFIX:
            raise ModelError(
                f"model {shortened(repr(str(model)))} is an ONNX model: it is rewritten, by "
                f"lminf_export.rewrite or lminf-export --model, and not exported"
            )
        elif is_file(folder):
            raise ModelError(
                f"model {shortened(repr(str(model)))} is a file and not GGUF; give the folder that "
                f"holds config.json"
            )
    elif folder.suffix.lower() == SUFFIX:
        raise ModelError(
            f"model {shortened(repr(str(model)))}: no such file here; a GGUF file is read from "
            f"this machine: check the path, or fetch the file first"
        )
    else:
        weights = (
            *WEIGHT_PATTERNS,
            *(PICKLE_PATTERNS if allow_pickle else ()),
            *(CODE_PATTERNS if trust_remote_code else ()),
        )
        folder = _download(str(model), revision, cache_dir, weights)
        name, commit = str(model), folder.name
        _refuse_other_files(folder, name, commit)
    refuse_links_to_outside(folder)
    content, named = _by_known_name(read_config_file(folder, str(model)))
    quantization = quantization_of(folder, content, str(model))
    if quantization is not None:
        check_quantization(quantization, str(model))
    config = _load_config(folder, str(model), content, named, trust_remote_code)
    if hasattr(config, QUANTIZATION):
        delattr(config, QUANTIZATION)
    text_part = _text_part(content, config)
    if text_part is not None:
        config = text_part.config
    return Source(
        folder, name, commit, config, quantization, text_part=text_part, gguf=gguf, named=named
    )


def _download(
    name: str, revision: str | None, cache_dir: str | Path | None, weights: Iterable[str]
) -> Path:
    from huggingface_hub import snapshot_download

    files = (*CONFIG_FILES, MODELOPT_FILE, TIKTOKEN_PATTERN)
    patterns = [*weights, *TOKENIZER_FILES, EXTRA_TEMPLATES, *files, *LICENSE_PATTERNS]
    with hub_errors_as(ModelError, f"model {shortened(repr(name))}", revision):
        folder = snapshot_download(
            name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns
        )
    return Path(folder)


def _refuse_other_files(folder: Path, name: str, commit: str) -> None:
    """Refuse a repository of the hub with GGUF files or graphs only: which one is not said.

    Raises:
        ModelError: naming one of them.
    """
    if any(next(folder.glob(kind), None) for kind in (WEIGHT_PATTERNS[0], PICKLE_PATTERNS[0])):
        return
    from huggingface_hub import list_repo_files

    files: list[str] = []
    with suppress(ModelError), hub_errors_as(ModelError, name, commit):
        files = sorted(list_repo_files(name, revision=commit))
    if not files:  # no network: what the hub's cache has
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if is_file(p))
    shown = shortened(repr(name))
    for file in files:
        if file.endswith(SUFFIX):
            raise ModelError(
                f"model {shown} holds GGUF files on the hub, and no safetensors: fetch one, "
                f"`hf download {shortened(name)} {shortened(file)} --local-dir .`, and give it "
                f"as --model"
            )
    graphs = [file for file in files if file.endswith(_ONNX_SUFFIX)]
    if graphs:
        usual = [file for file in graphs if file.rpartition("/")[2] == "model.onnx"]
        graph = shortened((usual or graphs)[0])
        raise ModelError(
            f"model {shown} holds ONNX models on the hub, and no safetensors; one is given as a "
            f'local folder: `hf download {shortened(name)} --include "{graph}*" --include '
            f'"*.json" --include "*.jinja" --local-dir DIR`, then --model DIR'
        )


def plain_config(source: Source, *, of_files: bool = False) -> str:
    """Return the text of config.json for the tensors in a bundle.

    As it is, but for quantisation, which is undone there, tied embeddings, which the checkpoint or
    an adapter may have set apart, and another name of its type. Of a multimodal model it is that of
    the text model.

    Args:
        source: the model.
        of_files: the bundle holds the model's own files; of a multimodal model, all of it.
    """
    if source.text_part is not None and not of_files:
        return _text_config(source.config)
    text = (source.folder / "config.json").read_text(encoding="utf-8")
    if source.quantization is None and not source.is_untied and source.named is None:
        return text
    content = {**json.loads(text), "model_type": source.model_type}
    content.pop(QUANTIZATION, None)
    if source.is_untied:
        content["tie_word_embeddings"] = False
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _text_config(config: Any) -> str:
    """Return config.json of a text model that had none of its own."""
    from transformers import PreTrainedConfig

    usual = PreTrainedConfig().to_dict()
    own = {
        name: value
        for name, value in config.to_dict().items()
        if not name.startswith("_") and (name not in usual or usual[name] != value)
    }
    own.pop(QUANTIZATION, None)
    own |= {"model_type": config.model_type, "tie_word_embeddings": config.tie_word_embeddings}
    own["architectures"] = [causal_lm_name(config.model_type)]
    return json.dumps(own, indent=2, ensure_ascii=False) + "\n"


def _by_known_name(content: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return a config.json with its type as transformers names it, and the name it has there."""
    from lminf_export.models.aliases import alias_of

    known = alias_of(content)
    if known is None:
        return content, None
    return {**content, "model_type": known}, content["model_type"]


def _load_config(
    folder: Path, model: str, content: Any, named: str | None, trust_remote_code: bool
) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = content["model_type"]
    if not is_known(kind):
        check_kind(content, None, tested=False)
        if not trust_remote_code:
            raise ModelError(_unknown(kind, content))
    try:
        if named is not None:
            config = CONFIG_MAPPING[kind].from_dict({**content, "_name_or_path": str(folder)})
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except CODE_ERRORS as error:
        reason = shortened(str(error) or type(error).__name__, 140)
        raise ModelError(
            f"config.json of model {shortened(repr(model))} cannot be used: {reason}"
        ) from error
    if trust_remote_code:
        allow_code(config)
    return config


def _text_part(content: dict[str, Any], config: Any) -> TextPart | None:
    """Check what kind of model a configuration is; return its text model if it wraps one.

    Raises:
        ModelError: it is of a kind that cannot be exported.
    """
    from lminf_export.models.registry import FAMILIES

    kind = content["model_type"]
    with model_errors(config):
        text = text_config_of(config)
    if text is None:
        tested = kind in FAMILIES and not runs_own_code(config)
        check_kind(content, config, tested=tested)
        return None
    check_kind(content, config, tested=True)
    inner = text.model_type
    check_kind({"model_type": inner}, text, tested=inner in FAMILIES, wrapper=kind)
    if hasattr(text, QUANTIZATION):
        delattr(text, QUANTIZATION)
    with model_errors(config):
        return find_text_part(config, text)


def _unknown(kind: str, content: dict[str, Any]) -> str:
    name, library = shortened(repr(kind), 40), f"transformers {package_version('transformers')}"
    if content.get("auto_map"):
        return (
            f"model type {name} is custom code of its repository (auto_map in config.json), not "
            f"of {library}; --trust-remote-code runs it; {SEE_FAMILIES} be exported"
        )
    return f"model type {name} is unknown to {library}; {SEE_FAMILIES} be exported"
