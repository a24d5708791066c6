"""`lminf inspect`: what a bundle holds and what its cache costs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from lminf_export.bench.floor import cache_bytes_per_step, weight_bytes_per_step
from lminf_export.bench.parameters import count_parameters
from lminf_export.bundle.files import human_bytes
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.manifest import Manifest
from lminf_export.bundle.records import BUILD_SCRIPT_NAME, MANIFEST_NAME, Engine, Layer, Plugin
from lminf_export.bundle.trust import is_trusted
from lminf_export.cli.common import handle_errors, verbosity_options
from lminf_export.cli.terminal import echo_json
from lminf_export.disk import exists, is_dir, is_file, onnx_files
from lminf_export.errors import BundleError, SessionError, shortened
from lminf_export.rewriting.detecting import find_onnx_model
from lminf_export.runtime.cache_use import DECLARED
from lminf_export.runtime.chat.files import find_template
from lminf_export.runtime.kernels import INSTALLED, open_library

# What the unmodified model's cache is compared at.
_LENGTHS = {"32k": 32 * 1024, "1M": 1_000_000}
# A position at which every ring is full.
_FAR = 2**30


@click.command("inspect")
@click.argument("bundle", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the manifest and the costs.")
@click.option("--verify", is_flag=True, help="Hash every file, weights too.")
@verbosity_options
@handle_errors
def inspect_command(bundle: str, as_json: bool, verify: bool) -> None:
    """Show what is inside BUNDLE and what its cache costs.

    BUNDLE may be an ONNX model of another tool, its file or folder: then what it attends with, and
    whether `lminf-export --model` can rewrite it.
    """
    if _is_foreign(bundle):
        from lminf_export.cli.inspect_onnx import show_onnx

        show_onnx(bundle, as_json=as_json)
        return
    opened = Bundle.open(bundle, "full" if verify else "fast")
    if as_json:
        content: dict[str, Any] = {"path": str(opened.path), "cache": cache_costs(opened.manifest)}
        content.update(graph_costs(opened) or {"parameters": None, "bytes_per_token": None})
        content["chat_template"] = chat_template_file(opened)
        content["kernels"] = kernel_choice()
        content["manifest"] = opened.manifest.model_dump(mode="json")
        echo_json(content)
        return
    _print_tables(opened)


def _is_foreign(path: str) -> bool:
    """Say whether a path is an ONNX model and belongs to no bundle.

    Raises:
        BundleError: a folder has a graph beside a checkpoint; which is meant is not said.
    """
    folder = Path(path) if is_dir(Path(path)) else Path(path).parent
    if is_file(folder / MANIFEST_NAME) or not exists(Path(path)):
        return False
    if find_onnx_model(path) is not None:
        return True
    if graphs := onnx_files(folder):
        raise BundleError(
            f"{path} is not a bundle: it has a checkpoint, and beside it an ONNX model; to inspect "
            f"that, name its file, {shortened(graphs[0].relative_to(folder).as_posix(), 40)}"
        )
    return False


def cache_costs(manifest: Manifest) -> dict[str, Any]:
    """Return bytes of one sequence's cache: bounded, and what a full one would take."""
    return {
        "bytes_per_sequence": manifest.cache_bytes_per_sequence,
        "full_cache_bytes": {name: manifest.full_cache_bytes(n) for name, n in _LENGTHS.items()},
    }


def graph_costs(bundle: Bundle) -> dict[str, Any] | None:
    """Return what a model has and reads, None if its graph cannot be read.

    Returns:
        "parameters": their number. "bytes_per_token": "weights" and "cache", the bytes that one
        token of one stream reads at least, the cache when every ring is full.
    """
    try:
        weights = weight_bytes_per_step(bundle, 1)
        parameters = count_parameters(bundle)
    except BundleError:
        return None
    reads = {"weights": weights, "cache": cache_bytes_per_step(bundle, _FAR)}
    return {"parameters": parameters, "bytes_per_token": reads}


def chat_template_file(bundle: Bundle) -> str | None:
    """Return the file of a bundle that holds the chat template, None without one."""
    try:
        found = find_template(bundle.path, bundle.manifest.files)
    except BundleError:
        return None
    return found[0] if found else None


def kernel_choice() -> dict[str, Any]:
    """Return what `--kernels auto` loads on this machine; no bundle carries kernels.

    Returns:
        "library" is None where the graph's function body computes attention; "problem" says
        what is wrong with an installed library.
    """
    try:
        found = open_library(INSTALLED) if INSTALLED.is_file() else None
    except SessionError as error:
        return {"library": None, "problem": str(error)}
    if found is None:
        return {"library": None, "problem": None}
    return {
        "library": str(found.path),
        "instruction_set": found.instruction_set,
        "providers": list(found.providers),
        "problem": None,
    }


def _print_tables(bundle: Bundle) -> None:
    from rich.console import Console
    from rich.table import Table

    manifest = bundle.manifest
    facts = Table(title=f"bundle {bundle.path.resolve().name}", title_justify="left")
    facts.add_column("what")
    facts.add_column("value", overflow="fold")
    rows = [
        *_model_facts(manifest),
        *_cost_facts(bundle),
        *_cache_facts(manifest),
        *_engine_facts(manifest),
    ]
    for name, value in [*rows, ("kernels in onnxruntime", _kernels(kernel_choice()))]:
        facts.add_row(name, value)
    files = Table(title="files", title_justify="left")
    files.add_column("name", overflow="fold")
    files.add_column("role")
    files.add_column("size", justify="right")
    files.add_column("SHA-256")
    for name, entry in manifest.files.items():
        files.add_row(name, entry.role, human_bytes(entry.bytes), entry.sha256[:16] + "…")
    console = Console(highlight=False)
    console.print(facts)
    console.print(files)
    for notice in manifest.notices:
        console.print(f"note: {notice}")


def _model_facts(manifest: Manifest) -> list[tuple[str, str]]:
    settings, source = manifest.settings, manifest.source
    revision = f" at {source.revision}" if source.revision else ""
    trained = f"{manifest.training_length} tokens" if manifest.training_length else "unknown"
    return [
        ("model", manifest.model_type),
        ("source", f"{source.name}{revision}"),
        *([("text part of", f"a {source.wrapper} model")] if source.wrapper else []),
        *([("rewritten from", source.rewritten.description)] if source.rewritten else []),
        *([("adapter", f"{source.adapter}, merged")] if source.adapter else []),
        ("element type", manifest.dtype),
        ("quantised", manifest.quantised),
        ("vocabulary", str(manifest.vocab_size)),
        ("training length", trained),
        ("sink tokens", str(settings.num_sink_tokens)),
        ("window", f"{settings.window_size} tokens"),
        ("distance limit", f"{settings.distance_limit} tokens"),
        ("chunk", f"{settings.chunk_size} tokens"),
        ("layers", _layers(manifest.layers)),
        ("query heads", str(manifest.num_attention_heads)),
        ("tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
        ("SHA-256 of the manifest", manifest.manifest_sha256),
    ]


def _cost_facts(bundle: Bundle) -> list[tuple[str, str]]:
    costs = graph_costs(bundle)
    template = ("chat template", chat_template_file(bundle) or "none")
    if costs is None:
        return [("parameters", "unknown: the graph cannot be read"), template]
    reads = costs["bytes_per_token"]
    weights, cache = human_bytes(reads["weights"]), human_bytes(reads["cache"])
    return [
        ("parameters", f"{costs['parameters']:,}"),
        ("a token reads", f"{weights} of weights and at most {cache} of cache"),
        template,
    ]


def _layers(layers: tuple[Layer, ...]) -> str:
    """Return the layers, equal ones counted together."""
    words = {"lambda": "Λ", "sliding": "sliding window"}
    texts = (
        f"{words[layer.kind]}, {layer.num_kv_heads} key/value heads of {layer.head_dim}, "
        f"ring of {layer.ring_capacity}"
        for layer in layers
    )
    return "\n".join(f"{count} × {text}" for text, count in Counter(texts).items())


def _cache_facts(manifest: Manifest) -> list[tuple[str, str]]:
    rows = [
        ("cache per sequence", f"{human_bytes(manifest.cache_bytes_per_sequence)}, without end")
    ]
    if manifest.kv_cache_dtype is not None:
        kind = f"{manifest.kv_cache_dtype}, a float32 scale for each token and key/value head"
        rows.append(("cache of the window", kind))
    for name, length in _LENGTHS.items():
        cost = human_bytes(manifest.full_cache_bytes(length))
        rows.append((f"a full cache at {name} tokens", cost))
    return rows


def _engine_facts(manifest: Manifest) -> list[tuple[str, str]]:
    engine = manifest.engine
    if engine is None:
        recipe = manifest.engine_recipe
        by = f" by {BUILD_SCRIPT_NAME}" if BUILD_SCRIPT_NAME in manifest.files else ""
        return [("engine", f"none; {recipe.file} can be built elsewhere{by}" if recipe else "none")]
    profiles = "; ".join(
        ", ".join(f"{name} {low}…{high}" for name, (low, _, high) in profile.items())
        for profile in engine.profiles
    )
    return [
        ("engine", f"{engine.file}, {engine.dtype}, {engine.note}"),
        ("engine builder", f"{engine.builder} {engine.version}, for {engine.target}"),
        ("engine profiles", profiles),
        ("engine plugin", _plugin(engine.plugin)),
        ("engine caches", _updates(engine)),
        (
            "plan trusted here",
            "yes" if is_trusted(manifest) else "no; --trust-plan once, to run it",
        ),
    ]


def _plugin(plugin: Plugin | None) -> str:
    if plugin is None:
        return "none, standard operators"
    return f"{plugin.file}, {'in the plan' if plugin.embedded else 'beside the plan'}"


def _updates(engine: Engine) -> str:
    """Say how caches are to be updated in place; only a step on a GPU shows whether they are."""
    if engine.plugin is None:
        return "rings updated in place, sinks in two buffers"
    how = engine.options.get("cache_aliasing", DECLARED)
    return f"{how} as updated in place; lminf bench on its GPU shows whether TensorRT copies them"


def _kernels(choice: dict[str, Any]) -> str:
    if choice["problem"]:
        return f"none in the bundle; --kernels auto fails: {choice['problem']}"
    if choice["library"] is None:
        return "none in the bundle, none installed: the graph's function body computes attention"
    name, providers = Path(choice["library"]).name, " and ".join(choice["providers"])
    return (
        f"none in the bundle; --kernels auto takes {name} ({choice['instruction_set']}), installed "
        f"with this package, for provider {providers}"
    )
