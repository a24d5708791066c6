"""The small files of a model that are copied into its bundle, and the stop tokens they name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable

from lminf_export.bundle.writer import BundleWriter
from lminf_export.checkpoint.source import (
    CONFIG_FILES,
    EXTRA_TEMPLATES,
    TOKENIZER_FILES,
    Source,
    plain_config,
)
from lminf_export.errors import ModelError
from lminf_export.export.tokenizer_check import TOKENIZER, check_tokenizer
from lminf_export.operator.settings import as_integer
from lminf_export.tensors.files import INDEX_NAME


def copy_tokenizer_files(source: Source, writer: BundleWriter, *, with_index: bool) -> list[str]:
    """Copy the tokenizer, chat templates and configuration into a bundle.

    `config.json` is that of the unquantised model. With `with_index` (linked weights) the index
    of the shards is copied too. The tokenizer is compared with transformers', and mended.

    Returns:
        Notices: what was mended, or cannot be.
    """
    configs = (*CONFIG_FILES, *([INDEX_NAME] if with_index else []))
    templates = [
        path.relative_to(source.folder).as_posix()
        for path in sorted(source.folder.glob(EXTRA_TEMPLATES))
        if path.is_file()
    ]
    for names, role in (((*TOKENIZER_FILES, *templates), "tokenizer"), (configs, "config")):
        for name in names:
            if name != "config.json" and (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, writer.add(name, role))  # type: ignore[arg-type]
    config = writer.add("config.json", "config")
    config.write_text(plain_config(source), encoding="utf-8")
    notices = check_tokenizer(source.folder, config.parent)
    if (config.parent / TOKENIZER).is_file():
        writer.add(TOKENIZER, "tokenizer")
    return notices


def eos_ids(source: Source) -> list[int]:
    """Return the stop tokens that a model's files name, those outside its vocabulary left out.

    Raises:
        ModelError: the files name a value that is not a token id.
    """
    return [token for token in _named_eos_ids(source) if token < source.config.vocab_size]


def eos_notices(source: Source) -> Iterable[str]:
    """Yield a notice if stop tokens are outside the vocabulary."""
    size = source.config.vocab_size
    outside = [str(token) for token in _named_eos_ids(source) if token >= size]
    if outside:
        yield (
            f"eos_token_id {', '.join(outside)} is outside the vocabulary of {size}: "
            f"it is never written and does not stop a text"
        )


def _named_eos_ids(source: Source) -> list[int]:
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
