"""The parts of `lminf.json`, each checked field by field: files, layers, engines, quantisation."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

from lminf_export.operator.bindings import LayerSpec
from lminf_export.operator.settings import Dtype, LambdaConfig, LambdaLayers, RopeRegime

MANIFEST_NAME = "lminf.json"
# The script that runs an engine recipe's command.
BUILD_SCRIPT_NAME = "build_engine.sh"
NOT_EXECUTED = "built, not executed here"

Role = Literal["graph", "weights", "plan", "plugin", "engine_graph", "tokenizer", "config", "other"]
RingWrites = Literal["linear", "circular"]
LayerKind = Literal["lambda", "sliding"]


def check_file_name(name: str) -> str:
    """Return a bundle's file name, or raise ValueError if it could point outside the bundle."""
    path = PurePosixPath(name)
    plain = (
        name == str(path)
        and not path.is_absolute()
        and not any(part == ".." for part in path.parts)
    )
    if not plain or name in ("", ".", MANIFEST_NAME) or any(c in name for c in "\\\0\n"):
        raise ValueError(f"{name!r} is not a plain relative file name")
    return name


def check_source_name(name: str) -> str:
    """Return a model's name, or raise ValueError for a path of some machine."""
    if not name or name.startswith(("/", "~")) or "\\" in name or ".." in name.split("/"):
        raise ValueError(f"{name!r} is neither a model id nor a folder's name")
    return name


FileName = Annotated[str, AfterValidator(check_file_name)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Record(BaseModel):
    """A frozen part of the manifest: no conversions, no unknown fields."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class OnnxOrigin(Record):
    """The ONNX model that a rewritten bundle was made of.

    Attributes:
        file: the graph's name.
        producer: the tool that wrote it and its version, "" where the graph names none.
        integer_products: type of the integers → number of products with weights of that type.
        compared: whether the bundle's graph was run against it before it was written; None in
            bundles that do not say it.
    """

    file: str
    producer: str = ""
    integer_products: dict[str, Count] = {}
    compared: bool | None = None

    @property
    def description(self) -> str:
        """The record as one phrase."""
        stored = ", ".join(f"{count} products of {n}" for n, count in self.integer_products.items())
        by = f" of {self.producer}" if self.producer else ""
        return f"{self.file}{by}{f' with {stored}' if stored else ''}"


class SourceRecord(Record):
    """The origin of the weights: a model id or a folder's name, and the revision asked for.

    Attributes:
        name: of the model.
        revision: of the hub.
        adapter: name of a LoRA adapter merged into them, or None.
        wrapper: type of the multimodal model whose text model it is; only there if it is one.
        rewritten: the ONNX model that was rewritten; only there if one was.
    """

    name: Annotated[str, AfterValidator(check_source_name)]
    revision: str | None = None
    adapter: Annotated[str, AfterValidator(check_source_name)] | None = None
    wrapper: str | None = None
    rewritten: OnnxOrigin | None = None

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        for name in ("wrapper", "rewritten"):  # a bundle of a text model is what it always was
            if fields.get(name) is None:
                fields.pop(name, None)
        return fields


class LambdaSettings(Record):
    """The fields of `LambdaConfig`."""

    window_size: int
    num_sink_tokens: int
    distance_limit: int
    chunk_size: int
    lambda_layers: LambdaLayers = "full"
    rope_regime: RopeRegime | None = None

    @model_validator(mode="after")
    def _follows_the_rules(self) -> LambdaSettings:
        self.to_config()
        return self

    def to_config(self) -> LambdaConfig:
        """Return the validated configuration."""
        return LambdaConfig(**self.model_dump())


class Layer(Record):
    """One layer's cache, as `bindings.LayerSpec`, and whether Λ or its own window rules it."""

    kind: LayerKind
    num_kv_heads: Positive
    head_dim: Positive
    window_size: Positive
    num_sink_tokens: Count
    distance_limit: Positive
    ring_capacity: Positive

    @property
    def spec(self) -> LayerSpec:
        """The layer as the graph's contract describes it."""
        return LayerSpec(**self.model_dump(exclude={"kind"}))


class Tensor(Record):
    """One row of the I/O table."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class FileEntry(Record):
    """Size in bytes, SHA-256 in hexadecimal and purpose of one file."""

    bytes: Count
    sha256: Sha256
    role: Role


class Plugin(Record):
    """The library an engine's `LambdaAttention` layers run in.

    Attributes:
        file: its name in the bundle.
        sha256: of the library.
        embedded: the plan carries the library itself; a session loads no file.
    """

    file: FileName
    sha256: Sha256
    embedded: bool = False


class Engine(Record):
    """A compiled engine.

    Attributes:
        builder: "tensorrt" or "tensorrt-rtx".
        version: of the builder, as it says itself.
        target: what it was built for, such as "sm_89" or "any".
        file: the plan's name in the bundle.
        dtype: element type of weights and caches.
        profiles: for each optimisation profile, symbol → (minimum, optimum, maximum).
        plugin: the library the plan needs, None if it needs none.
        ring_writes: "linear" if a chunk must not cross a ring's end, "circular" if it may.
        sinks_in_place: past and present sinks must be one buffer; otherwise they must be two.
        options: settings of the builder the user chose, in its words.
        executed: whether the plan ran on the machine that built it.
        note: text for users about `executed`.
    """

    builder: str
    version: str
    target: str
    file: FileName
    dtype: Dtype
    profiles: tuple[dict[str, tuple[int, int, int]], ...]
    plugin: Plugin | None = None
    ring_writes: RingWrites = "linear"
    sinks_in_place: bool = False
    options: dict[str, str] = {}
    executed: bool = False
    note: str = NOT_EXECUTED


class TensorBlocks(Record):
    """How one quantised weight is stored where it is in blocks.

    Attributes:
        bits: of an integer.
        block_size: input features that share a scale.
        method: "keep" for blocks of the source with their own values, else how scales were found.
        source_type: GGUF's name of the type of blocks that were kept.
    """

    bits: Literal[4, 8]
    block_size: Literal[16, 32, 64, 128, 256]
    method: Literal["range", "search", "calibrate", "keep"]
    source_type: str | None = None


class Quantization(Record):
    """The fields of `QuantizeConfig`, its form decided, and every weight in blocks by its name.

    Bundles of earlier versions name no weights: all have the block size of the settings.
    """

    weights: Literal["int4", "int8", "fp8"]
    block_size: Literal[16, 32, 64, 128, 256]
    symmetric: bool
    accuracy_level: Literal[1, 4]
    lm_head: Literal["auto", "same", "int8", "full"]
    embeddings: Literal["auto", "quantized", "full"]
    form: Literal["matmul_nbits", "qdq"]
    scales: Literal["search", "range"] = "range"
    source_blocks: Literal["keep", "requantize"] = "requantize"
    mixed: Literal["auto", "off"] = "off"
    tensors: dict[str, TensorBlocks] = {}

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the weights that have the source's own blocks."""
        return tuple(name for name, blocks in self.tensors.items() if blocks.method == "keep")

    @property
    def _mixed(self) -> int:
        """Weights of int8 beside int4, but for the lm_head and tables."""
        eights = [
            name
            for name, blocks in self.tensors.items()
            if blocks.bits == 8 and blocks.method != "keep" and self.weights == "int4"
        ]
        return sum("embed" not in name and "lm_head" not in name for name in eights)

    @property
    def rounds_activations(self) -> bool:
        """Whether onnxruntime rounds the activations that meet quantised weights to int8."""
        return self.form == "matmul_nbits" and self.accuracy_level == 4

    @property
    def description(self) -> str:
        """The settings as one line of text."""
        head = "" if self.lm_head == "same" else f", lm_head {self.lm_head}"
        head += f", {self._mixed} of other weights int8" if self._mixed else ""
        if self.form == "qdq" and self.weights != "int4":
            return f"{self.weights} with a scale for each output feature{head}, Q/DQ form"
        kind = "symmetric" if self.symmetric else "asymmetric"
        rounding = ", activations rounded to int8" if self.rounds_activations else ""
        form = ", Q/DQ form" if self.form == "qdq" else ""
        kept = f", {len(self.kept)} weights as the source had them" if self.kept else ""
        return f"{self.weights} in {kind} blocks of {self.block_size}{head}{kept}{rounding}{form}"


class EngineRecipe(Record):
    """The instructions by which TensorRT builds the plan from files of the bundle, on any machine.

    Attributes:
        graph: the ONNX file to build from.
        file: the name the plan will have in the bundle.
        profiles: as in `Engine`.
        needs_plugin: the graph has `LambdaAttention` nodes, which only the plugin takes.
        embed_plugin: the command puts the plugin into the plan.
        options: as in `Engine`.
        command: the `trtexec` line, to be run in the bundle's folder; `build_engine.sh` runs it,
            where trtexec can build the graph.
    """

    graph: FileName
    file: FileName
    profiles: tuple[dict[str, tuple[int, int, int]], ...]
    needs_plugin: bool
    embed_plugin: bool = False
    options: dict[str, str] = {}
    command: str
