"""One model in, one bundle out: load → adapt → trace → optimise → weights → engine → manifest."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import psutil

from lminf_export import weights
from lminf_export.bindings import LayerSpec
from lminf_export.bundle import Bundle
from lminf_export.bundle_writer import BundleWriter, OutTarget, check_destination, parse_out
from lminf_export.checkpoint import Checkpoint, open_checkpoint
from lminf_export.config import (
    DEFAULT_CHUNK_SIZE,
    DEFAULT_NUM_SINK_TOKENS,
    DEFAULT_WINDOW_CAP,
    LambdaConfig,
    as_integer,
)
from lminf_export.errors import ConfigError, ModelError
from lminf_export.graph import WrittenWeights, weights_name, write_graph
from lminf_export.manifest import (
    Dtype,
    Engine,
    Manifest,
    Quantization,
    human_bytes,
    new_manifest,
)
from lminf_export.manifest import Source as ManifestSource
from lminf_export.models import find_family
from lminf_export.models.base import AttentionPlan, Family
from lminf_export.progress import Progress, silent
from lminf_export.quantize.config import QuantizeConfig, decide_form
from lminf_export.quantize.estimate import weight_bytes
from lminf_export.source import CONFIG_FILES, TOKENIZER_FILES, Source, open_source, plain_config
from lminf_export.tracing import trace

logger = logging.getLogger(__name__)

DTYPES: tuple[str, ...] = get_args(Dtype)
TOOLS = ("lminf-export", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
BFLOAT16_NOTICE = (
    "bfloat16 graphs are for engines and GPUs: onnxruntime's CPU provider does not run them"
)


@dataclass(frozen=True)
class ExportOptions:
    """What a user may ask for; see `export` for the meaning of each field."""

    model: str | Path
    out: str | Path
    num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS
    window_size: int | None = None
    distance_limit: int | None = None
    chunk_size: int = DEFAULT_CHUNK_SIZE
    lambda_layers: str = "full"
    rope_regime: str | None = None
    dtype: str | None = None
    quantize: str | QuantizeConfig | None = None
    builder: str | None = None
    max_batch_size: int = 1
    revision: str | None = None
    cache_dir: str | Path | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    lora: str | Path | None = None
    force: bool = False


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
        target: where the bundle goes.
        builder: the engine's builder, or None for no engine.
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
    target: OutTarget
    builder: str | None
    checkpoint: Checkpoint
    notices: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in the bundle; an estimate where they are quantised."""
        shapes = [tensor.shape for tensor in self.checkpoint.tensors.values()]
        width = weights.item_size(self.dtype)
        return weight_bytes(shapes, width, self.source.config.vocab_size, self.quantize)

    def manifest(self, engine: Engine | None = None, notices: Iterable[str] = ()) -> Manifest:
        """Return the bundle's manifest, before its files are known."""
        config = self.source.config
        return new_manifest(
            model_type=self.source.model_type,
            source=ManifestSource(
                name=self.source.name,
                revision=self.source.revision,
                adapter=self.checkpoint.adapter,
            ),
            settings=self.settings,
            dtype=self.dtype,
            quantization=Quantization(**asdict(self.quantize)) if self.quantize else None,
            vocab_size=config.vocab_size,
            num_attention_heads=self.plan.num_attention_heads,
            layers=self.plan.layers,
            layer_kinds=["sliding" if own else "lambda" for own in self.plan.sliding],
            graph=self.target.graph_name,
            training_length=self.family.training_length(config),
            bos_token_id=getattr(config, "bos_token_id", None),
            eos_token_ids=_eos_ids(self.source),
            tools={name: _version(name) for name in TOOLS},
            notices=(*self.notices, *notices),
            engine=engine,
        )


def export(
    model: str | Path,
    out: str | Path,
    *,
    num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS,
    window_size: int | None = None,
    distance_limit: int | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    lambda_layers: str = "full",
    rope_regime: str | None = None,
    dtype: str | None = None,
    quantize: str | QuantizeConfig | None = None,
    builder: str | None = None,
    max_batch_size: int = 1,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    lora: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Export a model of Hugging Face to a bundle that decodes for ever.

    Args:
        model: folder, or hub id.
        out: the bundle's folder, or DIR/NAME.plan or DIR/NAME.onnx for a bundle DIR with that
            as its last product.
        num_sink_tokens: N, starting tokens that stay visible for ever; may be 0.
        window_size: W, keys a query sees, its own included; by default the model's original
            training length, at most 4096.
        distance_limit: L ≥ W, distance at which the starting tokens appear; default W.
        chunk_size: most new tokens in one step.
        lambda_layers: "full" gives sinks to layers that see everything by training; "all" also
            to layers trained with a sliding window, within that window.
        rope_regime: "short" or "long", what a rotary scaling that depends on the length of the
            text (dynamic NTK, longrope) is frozen to; by default what the window fits.
        dtype: "float32", "float16" or "bfloat16"; by default float16 with an engine and
            float32 without.
        quantize: "int4" or "int8" stores the weights of projections in blocks of so many bits;
            a `QuantizeConfig` says it in detail. By default they are not quantised.
        builder: "tensorrt" or "tensorrt-rtx"; needed only where both are installed.
        max_batch_size: largest batch of the engine (the ONNX graph takes any).
        revision: branch, tag or commit of a hub model.
        cache_dir: where files of the hub are kept.
        trust_remote_code: run Python a model repository brings; off by default.
        allow_pickle: read `.bin` weights where there are no safetensors; off by default.
        lora: folder of a PEFT LoRA adapter to merge into the weights.
        force: replace an existing bundle.
        progress: told which phase runs.

    Returns:
        The written bundle.

    Raises:
        LminfError: with one line of what was expected, what was found and what to do; nothing
            is left behind.
    """
    options = ExportOptions(
        model,
        out,
        num_sink_tokens=num_sink_tokens,
        window_size=window_size,
        distance_limit=distance_limit,
        chunk_size=chunk_size,
        lambda_layers=lambda_layers,
        rope_regime=rope_regime,
        dtype=dtype,
        quantize=quantize,
        builder=builder,
        max_batch_size=max_batch_size,
        revision=revision,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        lora=lora,
        force=force,
    )
    return run_job(prepare(options, progress), progress)


def prepare(options: ExportOptions, progress: Progress = silent) -> ExportJob:
    """Check every setting and the model, and decide all that is left open; write nothing.

    Raises:
        LminfError: as `export`.
    """
    target = parse_out(options.out)
    check_destination(target.directory, force=options.force)
    builder = _builder(options.builder) if target.engine_name else None
    dtype = _dtype(options.dtype, target)
    quantize = decide_form(options.quantize, dtype, with_engine=target.engine_name is not None)
    as_integer("max_batch_size", options.max_batch_size, 1)
    if options.builder is not None and target.engine_name is None:
        raise ConfigError(
            f"builder={options.builder!r}: no engine is asked for; name one, such as "
            f"--out {target.directory / 'engine.plan'}"
        )
    progress("reading the model", None)
    source = open_source(
        options.model,
        revision=options.revision,
        cache_dir=options.cache_dir,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
    )
    family = find_family(source.model_type)
    window, notices = default_window(options.window_size, family.training_length(source.config))
    settings = LambdaConfig(
        window_size=window,
        num_sink_tokens=options.num_sink_tokens,
        distance_limit=options.distance_limit,  # type: ignore[arg-type]  # None means the window
        chunk_size=options.chunk_size,
        lambda_layers=options.lambda_layers,
        rope_regime=options.rope_regime,
    )
    plan = family.plan(source.config, settings)
    checkpoint = open_checkpoint(
        source,
        options.lora,
        allow_pickle=options.allow_pickle,
        trust_remote_code=options.trust_remote_code,
    )
    family.check_weights(checkpoint.source.config, checkpoint.tensors)
    notices += [*plan.notices, *checkpoint.notices, *_dtype_notices(options.dtype, dtype)]
    notices += _memory_notices(plan.layers, dtype)
    job = ExportJob(
        options=options,
        source=checkpoint.source,
        family=family,
        settings=settings,
        plan=plan,
        dtype=dtype,
        quantize=quantize,
        target=target,
        builder=builder,
        checkpoint=checkpoint,
        notices=tuple(notices),
    )
    job.manifest()  # what the configuration gets wrong shows here, not after the work
    return job


def run_job(job: ExportJob, progress: Progress = silent) -> Bundle:
    """Write the bundle of a prepared job.

    Raises:
        LminfError: as `export`.
    """
    with BundleWriter(job.target.directory, force=job.options.force) as writer:
        writer.require_space(job.weight_bytes)
        progress("tracing", None)
        traced = trace(
            job.source.config,
            job.family,
            job.plan,
            job.dtype,
            trust_remote_code=job.options.trust_remote_code,
        )
        graph = writer.add(job.target.graph_name, "graph")
        weights_file = weights_name(job.quantize)
        writer.add(weights_file, "weights")
        written = write_graph(
            traced,
            job.plan,
            job.dtype,
            job.checkpoint.tensors,
            graph,
            metadata=_metadata(job),
            quantize=job.quantize,
            progress=_byte_counter(progress, "writing weights", job.weight_bytes),
        )
        writer.set_digest(weights_file, written.sha256)
        _copy_companions(job.source, writer)
        engine = _build(job, writer, graph, progress)
        progress("hashing", None)
        manifest = writer.commit(job.manifest(engine, _weight_notices(written)))
    for notice in manifest.notices:
        logger.warning(notice)
    return Bundle.open(job.target.directory)


def _builder(asked: str | None) -> str:
    from lminf_export.build import select_builder

    return select_builder(asked)


def default_window(asked: int | None, training_length: int | None) -> tuple[int, list[str]]:
    """Return the window to use, and what to tell the user about it."""
    if asked is not None:
        return asked, []
    if training_length is None:
        raise ConfigError(
            "window_size: this model's configuration names no training length; "
            "give --window-size, at most the length it was trained on"
        )
    if training_length <= DEFAULT_WINDOW_CAP:
        return training_length, []
    notice = (
        f"the window is {DEFAULT_WINDOW_CAP} tokens, not the training length of "
        f"{training_length}: every token pays for the window; --window-size sets it"
    )
    return DEFAULT_WINDOW_CAP, [notice]


def _dtype(asked: str | None, target: OutTarget) -> Any:
    if asked is None:
        return "float16" if target.engine_name else "float32"
    if asked not in DTYPES:
        raise ConfigError(f"dtype={asked!r}: must be one of {', '.join(DTYPES)}")
    return asked


def _dtype_notices(asked: str | None, chosen: str) -> Iterable[str]:
    if chosen == "bfloat16":
        yield BFLOAT16_NOTICE
    if asked is None and chosen == "float16":
        yield "an engine is asked for, so weights and caches are float16; --dtype sets it"


def _weight_notices(written: WrittenWeights) -> Iterable[str]:
    if written.full_stacks:
        yield (
            f"the experts' weights are not quantised: {human_bytes(written.full_bytes)} of the "
            f"{human_bytes(written.num_bytes)} of weights stay as they are"
        )


def _memory_notices(layers: Iterable[LayerSpec], dtype: str) -> Iterable[str]:
    width = weights.item_size(dtype)
    needed = sum(layer.cache_elements for layer in layers) * width
    available = psutil.virtual_memory().available
    if needed > available:
        yield (
            f"one sequence's cache takes {human_bytes(needed)}, the machine that exported it had "
            f"{human_bytes(available)} of memory available; a smaller --window-size helps"
        )


def _metadata(job: ExportJob) -> dict[str, str]:
    """Return the essentials of the manifest as ONNX metadata_props."""
    settings = job.settings
    return {
        "lminf_export": _version("lminf-export"),
        "lminf.model_type": job.source.model_type,
        "lminf.source": job.source.name,
        "lminf.dtype": job.dtype,
        "lminf.quantize": job.quantize.weights if job.quantize else "none",
        "lminf.window_size": str(settings.window_size),
        "lminf.num_sink_tokens": str(settings.num_sink_tokens),
        "lminf.distance_limit": str(settings.distance_limit),
        "lminf.chunk_size": str(settings.chunk_size),
        "lminf.layers": json.dumps([vars(layer) for layer in job.plan.layers]),
    }


def _copy_companions(source: Source, writer: BundleWriter) -> None:
    """Copy tokenizer, chat template and configuration, the last without quantisation."""
    for names, role in ((TOKENIZER_FILES, "tokenizer"), (CONFIG_FILES, "config")):
        for name in names:
            if name != "config.json" and (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, writer.add(name, role))  # type: ignore[arg-type]
    writer.add("config.json", "config").write_text(plain_config(source), encoding="utf-8")


def _build(job: ExportJob, writer: BundleWriter, graph: Path, progress: Progress) -> Engine | None:
    if job.builder is None or job.target.engine_name is None:
        return None
    from lminf_export.build import EngineRequest, build_engine

    plan = writer.add(job.target.engine_name, "plan")
    request = EngineRequest(
        onnx_path=graph,
        plan_path=plan,
        dtype=job.dtype,
        layers=job.plan.layers,
        chunk_size=job.settings.chunk_size,
        max_batch_size=job.options.max_batch_size,
    )
    return build_engine(job.builder, request, progress)


def _eos_ids(source: Source) -> list[int]:
    """Return the stop tokens; generation_config.json overrules config.json, as in transformers."""
    configured = getattr(source.config, "eos_token_id", None)
    path = source.folder / "generation_config.json"
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            configured = content.get("eos_token_id", configured)
        except (ValueError, AttributeError) as error:
            raise ModelError(f"generation_config.json of {source.name!r} is damaged") from error
    if configured is None:
        return []
    ids = configured if isinstance(configured, list) else [configured]
    return [as_integer("eos_token_id", token, 0, ModelError) for token in ids]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _byte_counter(progress: Progress, phase: str, total: int) -> Any:
    done = 0

    def count(written: int) -> None:
        nonlocal done
        done += written
        progress(phase, min(done / max(total, 1), 1.0))

    return count
