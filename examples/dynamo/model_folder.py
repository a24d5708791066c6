"""The folder that Dynamo's frontend reads of a bundle: its tokenizer, its template, its ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lminf_export.bundle.folder import Bundle
from lminf_export.errors import BundleError

COPIED = ("config.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def write_model_folder(bundle: Bundle, folder: Path) -> Path:
    """Write what Dynamo's frontend needs of a bundle, and no weights; return the folder.

    The frontend wants an end-of-text id of every model. A bundle without one gets the number
    behind its vocabulary there, which no text has. Default settings of sampling stay out: those
    that a request does not name are the worker's, as in `lminf serve`.

    Args:
        bundle: with a tokenizer.
        folder: that is there and empty.

    Raises:
        BundleError: the bundle has no tokenizer, or none of the model's config.json.
    """
    tokenizer = bundle.tokenizer_path
    if tokenizer is None or not (bundle.path / "config.json").is_file():
        raise BundleError(
            f"{bundle.path}: Dynamo's frontend needs the bundle's tokenizer.json and config.json, "
            "and one of them is not there; export the model from a folder with a tokenizer"
        )
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    for name in COPIED:
        if (bundle.path / name).is_file():
            shutil.copyfile(bundle.path / name, folder / name)
    manifest = bundle.manifest
    ends = list(manifest.eos_token_ids) or [manifest.vocab_size]
    settings = {"bos_token_id": manifest.bos_token_id, "eos_token_id": ends}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder
