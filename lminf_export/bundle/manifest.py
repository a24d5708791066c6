"""`lminf.json`: what a bundle holds, checked field by field when it is read.

The manifest names every file with its size and SHA-256, and carries its own hash over the
canonical JSON of all other fields, so that an altered manifest is noticed too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from lminf_export.bundle.records import (
    Count,
    Engine,
    EngineRecipe,
    FileEntry,
    FileName,
    LambdaSettings,
    Layer,
    LayerKind,
    Positive,
    Quantization,
    Record,
    Role,
    Sha256,
    SourceRecord,
    Tensor,
)
from lminf_export.bundle.tables import first_difference, io_tables
from lminf_export.disk import parse_json
from lminf_export.errors import BundleError, ConfigError, shortened
from lminf_export.operator.bindings import LayerSpec
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import (
    MAX_POSITION,
    Dtype,
    KvCacheDtype,
    LambdaConfig,
    ring_capacity,
)
from lminf_export.tensors.dtypes import ELEMENT_TYPES

SCHEMA_VERSION: Literal[1] = 1


class Manifest(Record):
    """Everything `lminf.json` says; `new_manifest` starts one, `BundleWriter.commit` seals it.

    `kv_cache_dtype` is there only where the rings are not of `dtype`.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    model_type: str
    source: SourceRecord
    lambda_config: LambdaSettings
    dtype: Dtype
    quantization: Quantization | None = None
    kv_cache_dtype: KvCacheDtype | None = None
    vocab_size: Positive
    max_position: Annotated[int, Field(ge=1, le=MAX_POSITION)] = MAX_POSITION
    num_attention_heads: Positive
    training_length: Positive | None = None
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    bos_token_id: Count | None = None
    eos_token_ids: tuple[Count, ...] = ()
    graph: FileName
    files: dict[FileName, FileEntry] = Field(default_factory=dict)
    linked_files: tuple[FileName, ...] = ()
    tools: dict[str, str] = Field(default_factory=dict)
    notices: tuple[str, ...] = ()
    engine: Engine | None = None
    engine_recipe: EngineRecipe | None = None
    manifest_sha256: Sha256 | Literal[""] = ""

    @model_validator(mode="after")
    def _tables_follow_from_the_layers(self) -> Manifest:
        inputs, outputs = io_tables(self.contract)
        for what, found, expected in (
            ("inputs", self.inputs, inputs),
            ("outputs", self.outputs, outputs),
        ):
            if found != expected:
                raise ValueError(f"{what}: {first_difference(found, expected)}")
        return self

    @model_validator(mode="after")
    def _layers_follow_the_settings(self) -> Manifest:
        settings = self.lambda_config
        for index, layer in enumerate(self.layers):
            if layer.kind == "lambda" and layer.window_size != settings.window_size:
                raise ValueError(
                    f"layers[{index}].window_size={layer.window_size}: lambda_config has "
                    f"{settings.window_size}"
                )
            if layer.kind == "lambda" and layer.num_sink_tokens != settings.num_sink_tokens:
                raise ValueError(
                    f"layers[{index}].num_sink_tokens={layer.num_sink_tokens}: lambda_config has "
                    f"{settings.num_sink_tokens}"
                )
        if any(token >= self.vocab_size for token in self.eos_token_ids):
            raise ValueError(f"eos_token_ids: outside the vocabulary of {self.vocab_size}")
        return self

    @model_validator(mode="after")
    def _rings_hold_window_and_chunk(self) -> Manifest:
        chunk_size = self.lambda_config.chunk_size
        for index, layer in enumerate(self.layers):
            wanted = ring_capacity(layer.window_size, chunk_size)
            if layer.ring_capacity != wanted:
                raise ValueError(
                    f"layers[{index}].ring_capacity={layer.ring_capacity}: window "
                    f"{layer.window_size} and chunk {chunk_size} need {wanted}"
                )
        return self

    @property
    def settings(self) -> LambdaConfig:
        """The Λ configuration."""
        return self.lambda_config.to_config()

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The layers' caches, in order."""
        return tuple(layer.spec for layer in self.layers)

    @property
    def item_size(self) -> int:
        """Bytes of one element of the model's type."""
        return ELEMENT_TYPES[self.dtype].itemsize

    @property
    def contract(self) -> GraphContract:
        """The graph's inputs and outputs, and its caches."""
        return GraphContract(self.layer_specs, self.dtype, self.kv_cache_dtype, self.vocab_size)

    @property
    def quantised(self) -> str:
        """How the weights are quantised, in words."""
        if self.quantization is not None:
            return self.quantization.description
        origin = self.source.rewritten
        return "as the ONNX model has them" if origin and origin.integer_products else "no"

    @property
    def cache_bytes_per_sequence(self) -> int:
        """Bytes of one sequence's caches when every ring is full: the most they ever take."""
        return self.contract.cache_bytes()

    def full_cache_bytes(self, num_tokens: int) -> int:
        """Bytes the unmodified model's cache takes for one sequence of num_tokens tokens."""
        total = 0
        for layer in self.layers:
            tokens = num_tokens if layer.kind == "lambda" else min(num_tokens, layer.window_size)
            total += 2 * layer.num_kv_heads * layer.head_dim * tokens
        return total * self.item_size

    @property
    def state_id(self) -> str:
        """SHA-256 over what decides what a state means: graph, weights, Λ settings and caches.

        Bundles of one id have states in common, whatever engine, tokenizer or tools they have.
        """
        meaning = {
            "files": [
                [self.files[name].role, name, self.files[name].sha256]
                for name in sorted(self.files_of("graph", "weights"))
            ],
            **self.model_dump(
                mode="json",
                include={"lambda_config", "dtype", "kv_cache_dtype", "vocab_size", "layers"},
            ),
        }
        return content_sha256(meaning)

    @property
    def text_id(self) -> str:
        """SHA-256 over what decides which text token ids are: the tokenizer and its templates."""
        return content_sha256(
            {name: self.files[name].sha256 for name in self.files_of("tokenizer")}
        )

    def files_of(self, *roles: Role) -> list[str]:
        """Names of the files with one of these roles."""
        return [name for name, entry in self.files.items() if entry.role in roles]

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.kv_cache_dtype is None:  # a bundle without one is what it always was
            fields.pop("kv_cache_dtype", None)
        return fields

    def digest(self) -> str:
        """SHA-256 over the canonical JSON of every field but the hash itself."""
        return content_sha256(self.model_dump(mode="json"))

    def sealed(self, files: dict[str, FileEntry]) -> Manifest:
        """Return the manifest with its file table and its own hash filled in."""
        draft = self.model_copy(update={"files": dict(sorted(files.items()))})
        return draft.model_copy(update={"manifest_sha256": draft.digest()})

    def to_json(self) -> str:
        """Return the text of `lminf.json`."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"


def new_manifest(
    *,
    model_type: str,
    source: SourceRecord,
    settings: LambdaConfig,
    contract: GraphContract,
    num_attention_heads: int,
    layer_kinds: Sequence[LayerKind] | None = None,
    graph: str = "model.onnx",
    training_length: int | None = None,
    bos_token_id: int | None = None,
    eos_token_ids: Iterable[int] = (),
    tools: dict[str, str] | None = None,
    notices: Iterable[str] = (),
    engine: Engine | None = None,
    quantization: Quantization | None = None,
    engine_recipe: EngineRecipe | None = None,
) -> Manifest:
    """Start a manifest; the I/O tables follow from the contract, files come at commit.

    Args:
        contract: element types, vocabulary, layers and caches.
        layer_kinds: for each layer "lambda" or "sliding"; all "lambda" by default.
        graph: file name of the ONNX graph.

    The other arguments are the manifest's fields.

    Raises:
        ConfigError: a value that a manifest cannot hold.
    """
    kinds: Sequence[LayerKind] = layer_kinds or ["lambda"] * len(contract.layers)
    inputs, outputs = io_tables(contract)
    fields: dict[str, Any] = {
        "model_type": model_type,
        "source": source,
        "lambda_config": LambdaSettings(**asdict(settings)),
        "dtype": contract.dtype,
        "quantization": quantization,
        "kv_cache_dtype": contract.kv_cache_dtype,
        "vocab_size": contract.vocab_size,
        "num_attention_heads": num_attention_heads,
        "training_length": training_length,
        "layers": tuple(
            Layer(kind=kind, **vars(layer))
            for kind, layer in zip(kinds, contract.layers, strict=True)
        ),
        "inputs": inputs,
        "outputs": outputs,
        "bos_token_id": bos_token_id,
        "eos_token_ids": tuple(eos_token_ids),
        "graph": graph,
        "tools": tools or {},
        "notices": tuple(notices),
        "engine": engine,
        "engine_recipe": engine_recipe,
    }
    try:
        return Manifest(**fields)
    except ValidationError as error:
        raise ConfigError(f"a manifest cannot hold {_first_problem(error)}") from error


def read_manifest(text: bytes, where: str) -> Manifest:
    """Parse and check `lminf.json`.

    Args:
        text: the file's bytes.
        where: its path, for messages.

    Raises:
        BundleError: damaged JSON, another schema version, a wrong field or a wrong hash.
    """
    try:
        raw = parse_json(text)
    except ValueError as error:
        raise BundleError(
            f"{where} is damaged: {shortened(str(error), 90)}; export the model again"
        ) from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION or type(version) is not int:
        raise BundleError(
            f"{where}: schema version {version!r}, this lminf-export reads {SCHEMA_VERSION}; "
            "export the model again or use the version that wrote it"
        )
    if raw.get("manifest_sha256") != content_sha256(raw):
        raise BundleError(
            f"{where} was altered: it does not match its own manifest_sha256; "
            "export the model again"
        )
    try:
        return Manifest.model_validate_json(text)
    except (ValidationError, ConfigError) as error:
        raise BundleError(f"{where}: {_first_problem(error)}; export the model again") from None


def content_sha256(fields: dict[str, Any]) -> str:
    """SHA-256 of a manifest's canonical JSON: sorted keys, no spaces, without its own hash."""
    rest = {key: value for key, value in fields.items() if key != "manifest_sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _first_problem(error: ValidationError | ConfigError) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
