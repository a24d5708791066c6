"""The folder that Dynamo's frontend reads of a bundle: its tokenizer, its template, its ends."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from lminf_export.bundle.files import file_sha256
from lminf_export.bundle.folder import Bundle
from lminf_export.errors import BundleError, InputError

COPIED = ("config.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def model_folder(bundle: Bundle, parent: Path) -> Path:
    """Return the folder that Dynamo's frontend reads of a bundle, which holds no weights.

    Its name is a hash of what is in it: the frontend takes workers for replicas of one another only
    if they name the same path, and workers of one machine share the folder.

    The frontend wants an end-of-text id of every model. A bundle without one gets the number
    behind its vocabulary there, which no text has. Default settings of sampling stay out: those
    that a request does not name are the worker's, as in `lminf serve`.

    Args:
        bundle: with a tokenizer.
        parent: of the folder; made where it is missing.

    Raises:
        BundleError: the bundle has no tokenizer, or none of the model's config.json.
        InputError: the folder cannot be written.
    """
    if bundle.tokenizer_path is None or not (bundle.path / "config.json").is_file():
        raise BundleError(
            f"{bundle.path}: Dynamo's frontend needs the bundle's tokenizer.json and config.json, "
            "and one of them is not there; export the model from a folder with a tokenizer"
        )
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=parent) as scratch:
            return _in_place(_written(bundle, Path(scratch) / "model"), parent)
    except OSError as error:
        raise InputError(f"{parent} cannot be written: {error.strerror or error}") from error


def _written(bundle: Bundle, folder: Path) -> Path:
    folder.mkdir()
    tokenizer, manifest = bundle.tokenizer_path, bundle.manifest
    assert tokenizer is not None
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    for name in COPIED:
        if (bundle.path / name).is_file():
            shutil.copyfile(bundle.path / name, folder / name)
    ends = list(manifest.eos_token_ids) or [manifest.vocab_size]
    settings = {"bos_token_id": manifest.bos_token_id, "eos_token_id": ends}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def _in_place(written: Path, parent: Path) -> Path:
    """Give a folder its name, unless another worker has done so."""
    found = hashlib.sha256()
    for path in sorted(written.iterdir()):
        found.update(f"{path.name} {file_sha256(path)}\n".encode())
    folder = parent / found.hexdigest()[:16]
    try:
        written.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    return folder
