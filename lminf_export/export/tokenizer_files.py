"""The small files of a model that are copied into its bundle, and the stop tokens they name."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lminf_export.bundle.records import Role
from lminf_export.bundle.writer import BundleWriter
from lminf_export.checkpoint.source import (
    CONFIG_FILES,
    EXTRA_TEMPLATES,
    TOKENIZER_FILES,
    Source,
    plain_config,
)
from lminf_export.disk import is_file, read_json
from lminf_export.errors import ModelError, shortened
from lminf_export.export.tokenizer_check import TOKENIZER, check_tokenizer
from lminf_export.models.remote_code import may_run_code
from lminf_export.operator.settings import as_integer
from lminf_export.tensors.files import INDEX_NAME


def copy_tokenizer_files(source: Source, writer: BundleWriter, *, with_index: bool) -> list[str]:
    """Copy the tokenizer, chat templates and configuration into a bundle.

    `config.json` is that of the unquantised text model. With `with_index` (linked weights) it is
    that of the files, and the index of the shards is copied too. Python of the repository is copied
    if it may run. The tokenizer is compared with transformers', and mended.

    Returns:
        Notices: what was mended, or cannot be.
    """
    configs = [name for name in CONFIG_FILES if name != "config.json"]
    trusts = may_run_code(source.config)
    # Without them the reference of a validation could not be built from the bundle alone.
    code = sorted(path.name for path in source.folder.glob("*.py")) if trusts else []
    index = [INDEX_NAME] if with_index else []
    copy_present(source.folder, [*configs, *index, *code], writer, "config")
    config = writer.add("config.json", "config")
    config.write_text(plain_config(source, of_files=with_index), encoding="utf-8")
    return copy_tokenizer(source.folder, writer, trust_remote_code=trusts)


def copy_tokenizer(folder: Path, writer: BundleWriter, *, trust_remote_code: bool) -> list[str]:
    """Copy tokenizer and chat templates of a folder into a bundle, compare and mend them.

    Returns:
        Notices: what was mended, or cannot be.
    """
    templates = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.glob(EXTRA_TEMPLATES))
        if path.is_file()
    ]
    copy_present(folder, [*TOKENIZER_FILES, *templates], writer, "tokenizer")
    notices = check_tokenizer(folder, writer.folder, trust_remote_code=trust_remote_code)
    if (writer.folder / TOKENIZER).is_file():
        writer.add(TOKENIZER, "tokenizer")
    return notices


def copy_present(folder: Path, names: Iterable[str], writer: BundleWriter, role: Role) -> None:
    """Copy those of some files into a bundle that a folder has."""
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, writer.add(name, role))


def bos_id(config: Any) -> int | None:
    """Return the start token of a configuration, None if it names none.

    Raises:
        ModelError: it names a value that is not a token id.
    """
    token = getattr(config, "bos_token_id", None)
    return None if token is None else as_integer("bos_token_id", token, 0, ModelError)


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
    if is_file(path):
        what = f"generation_config.json of {shortened(repr(source.name))}"
        content = read_json(path, ModelError, what)
        if not isinstance(content, dict):
            raise ModelError(f"{what} is damaged: it holds no table")
        configured = content.get("eos_token_id", configured)
    if configured is None:
        return []
    ids = configured if isinstance(configured, list) else [configured]
    return [as_integer("eos_token_id", token, 0, ModelError) for token in ids]
