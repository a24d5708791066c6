"""The model card of a bundle: `README.md`, written from the manifest alone."""

from __future__ import annotations

import json
from collections.abc import Iterator

from lminf_export.bundle.files import human_bytes
from lminf_export.bundle.license import LICENSE_FILE, License
from lminf_export.bundle.manifest import Manifest
from lminf_export.bundle.records import BUILD_SCRIPT_NAME, MANIFEST_NAME

CARD_NAME = "README.md"
_TAGS = ("onnx", "onnxruntime", "lm-infinite", "streaming")


def model_card(manifest: Manifest, license: License | None = None) -> str:
    """Return the text of a bundle's card, with the front matter that the Hugging Face hub reads.

    Args:
        manifest: with its table of files; the card itself is not among them.
        license: of the source model, where its card names one.
    """
    parts = [
        _front_matter(manifest, license),
        f"# {_plain(manifest.source.name)}, decoding a stream without end",
        _introduction(manifest),
        _table(("", ""), _facts(manifest)),
        "## Use",
        _commands(manifest),
        "## Files",
        _table(("file", "role", "size"), _files(manifest)),
        *_engine(manifest),
        "## Licence",
        _license(manifest, license),
        *_notices(manifest),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(manifest: Manifest, license: License | None) -> str:
    """Return YAML; every value is JSON, which is YAML too."""
    fields: dict[str, object] = {"library_name": "lminf-export", "pipeline_tag": "text-generation"}
    if license is not None:
        fields["license"] = license.identifier.lower()
        named = {"license_name": license.name, "license_link": license.link}
        fields.update({key: value for key, value in named.items() if value is not None})
    if _is_hub_id(manifest.source.name):
        fields["base_model"] = manifest.source.name
        if manifest.quantization:
            fields["base_model_relation"] = "quantized"
    tags = [*_TAGS, manifest.model_type, *(["tensorrt"] if manifest.engine else [])]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---"])


def _introduction(manifest: Manifest) -> str:
    settings = manifest.settings
    version = manifest.tools.get("lminf-export")
    return (
        f"{_code(manifest.source.name)} as ONNX with Λ-shaped attention, written by lminf-export"
        f"{f' {_plain(version)}' if version else ''}. Every token sees the {settings.window_size} "
        f"latest tokens and the first {settings.num_sink_tokens} of the text, so caches stay as "
        "they are however long the text goes on."
    )


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    settings, source = manifest.settings, manifest.source
    yield "model family", _code(manifest.model_type)
    yield (
        "source",
        _code(source.name) + (f" at {_code(source.revision)}" if source.revision else ""),
    )
    if source.wrapper:
        yield "text part of", f"a {_code(source.wrapper)} model; it reads text only"
    if source.rewritten:
        yield "rewritten from", _code(source.rewritten.description)
    if source.adapter:
        yield "adapter, merged", _code(source.adapter)
    yield "element type", manifest.dtype
    yield "quantised", manifest.quantised
    weights = sum(manifest.files[name].bytes for name in manifest.files_of("weights"))
    yield "weights", human_bytes(weights) if weights else f"in {_code(manifest.graph)}"
    yield "vocabulary", str(manifest.vocab_size)
    yield "layers", str(len(manifest.layers))
    if manifest.training_length:
        yield "trained on", f"{manifest.training_length} tokens at a time"
    yield "window", f"{settings.window_size} tokens"
    yield "starting tokens kept", str(settings.num_sink_tokens)
    yield "distance limit", f"{settings.distance_limit} tokens"
    yield "tokens a step", f"at most {settings.chunk_size}"
    kind = f", {manifest.kv_cache_dtype} in the window" if manifest.kv_cache_dtype else ""
    yield "cache per text", human_bytes(manifest.cache_bytes_per_sequence) + kind


def _commands(manifest: Manifest) -> str:
    return (
        "With lminf-export installed:\n\n"
        "```sh\n"
        'lminf generate DIR --prompt "Once upon a time"   # DIR: this folder\n'
        f"{_validation(manifest)}"
        "lminf inspect DIR\n"
        "```\n\n"
        "```python\n"
        "import lminf_export\n\n"
        'model = lminf_export.load("DIR")   # or the id of this repository on the hub\n'
        'prompt = model.codec.encode("Once upon a time")\n'
        "tokens = model.generate(prompt, max_new_tokens=100)\n"
        'print("".join(model.codec.stream(tokens, after=prompt)))\n'
        "```\n\n"
        f"{_code(manifest.graph)} needs onnxruntime alone: inputs and outputs are in "
        f"{_code(MANIFEST_NAME)}, and how to run it without this package is in "
        "`docs/without_python.md` of lminf-export."
    )


def _validation(manifest: Manifest) -> str:
    """Return the command that compares a bundle with its model, "" where there is none."""
    origin = manifest.source.rewritten
    if origin is None:
        name = manifest.source.name
        return f"lminf validate DIR{f' --model {name}' if _is_hub_id(name) else ''}\n"
    if origin.integer_products:  # a checkpoint has other weights
        return ""
    return f"lminf validate DIR --model CHECKPOINT   # of which {_plain(origin.file)} was made\n"


def _files(manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    for name, entry in manifest.files.items():
        yield _code(name), entry.role.replace("_", " "), human_bytes(entry.bytes)


def _engine(manifest: Manifest) -> Iterator[str]:
    engine, recipe = manifest.engine, manifest.engine_recipe
    if engine is None and recipe is None:
        return
    yield "## Engine"
    if engine is not None:
        yield (
            f"{_code(engine.file)} is of {engine.builder} {_plain(engine.version)} for "
            f"{_plain(engine.target)}, {_plain(engine.note)}. A plan is code: `--trust-plan` runs "
            "one that was not built on your machine."
        )
    if recipe is not None and BUILD_SCRIPT_NAME in manifest.files:
        yield (
            f"`sh {BUILD_SCRIPT_NAME}` builds {_code(recipe.file)} with NVIDIA's trtexec on the "
            "machine whose GPU it is for."
        )


def _license(manifest: Manifest, license: License | None) -> str:
    files = [name for name in manifest.files if LICENSE_FILE.fullmatch(name)]
    where = f" Its files are here: {', '.join(map(_code, files))}." if files else ""
    if license is None:
        return f"The weights are under the licence of the source model.{where}"
    link = f" ({_plain(license.link)})" if license.link else ""
    return (
        f"The weights are under the source model's licence: {_plain(license.title)}{link}.{where}"
    )


def _notices(manifest: Manifest) -> Iterator[str]:
    if manifest.notices:
        yield "## Notices"
        yield "\n".join(f"- {_plain(notice)}" for notice in manifest.notices)


def _is_hub_id(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    return bool(slash and owner and rest) and all(
        char.isascii() and (char.isalnum() or char in "-_.") for char in owner + rest
    )


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Return text in one line that begins no markup and ends no cell."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|")


def _code(text: str) -> str:
    """Return text as inline code in one line."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
