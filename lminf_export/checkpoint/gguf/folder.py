"""A model in GGUF files as a model folder of Hugging Face: all of it but the weights.

The small files are written to a temporary folder, so that whatever reads a model's configuration or
tokenizer reads those of a GGUF model too. The weights stay where they are.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lminf_export.checkpoint.gguf.config import model_config
from lminf_export.checkpoint.gguf.metadata import Gguf
from lminf_export.checkpoint.gguf.tokenizer import TokenizerFiles
from lminf_export.errors import ModelError, shortened
from lminf_export.tensors.gguf_blocks import GgufTensor
from lminf_export.tensors.gguf_header import read_gguf

_TEMPLATE = "tokenizer.chat_template"
# Ends of a turn, by their text: files from before there was a key for them name only one token.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>")
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, eq=False)
class GgufFolder:
    """The files of a GGUF model that are not weights.

    Attributes:
        path: a temporary folder with config.json, generation_config.json and, where the file has
            a tokenizer that is read, tokenizer.json, tokenizer_config.json and chat templates. It
            is removed when this object is.
        gguf: the model.
        notices: lines for the user.
    """

    path: Path
    gguf: Gguf
    notices: tuple[str, ...]


def open_gguf(parts: tuple[Path, ...]) -> GgufFolder:
    """Read the headers of a model's files and write its small files to a temporary folder.

    Args:
        parts: its files, in order.

    Raises:
        ModelError: a file is damaged, the parts do not belong together, or the architecture is
            not read.
    """
    gguf = _joined(parts)
    files, notices = _files(gguf)
    folder = Path(tempfile.mkdtemp(prefix="lminf-gguf-"))
    found = GgufFolder(folder, gguf, notices)
    weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return found


def _joined(parts: tuple[Path, ...]) -> Gguf:
    first, *others = [read_gguf(part) for part in parts]
    tensors: dict[str, GgufTensor] = dict(first.tensors)
    for number, part in enumerate(others, 1):
        index = part.metadata.get("split.no", number)
        if index != number:
            raise ModelError(
                f"GGUF file {shortened(part.path.name)} says it is part {shortened(repr(index))} "
                f"and is named as part {number} (counted from 0); fetch the parts again"
            )
        if twice := tensors.keys() & part.tensors.keys():
            raise ModelError(
                f"tensor {shortened(min(twice))} is in two parts of GGUF model "
                f"{shortened(first.path.name)}; fetch the parts again"
            )
        tensors.update(part.tensors)
    count = first.metadata.get("split.count", 1)
    if isinstance(count, int) and count > 1 and count != len(parts):
        raise ModelError(
            f"GGUF file {shortened(first.path.name)} is one of {count} parts, and its name does "
            f"not say so; give the parts the names NAME-00001-of-{count:05d}.gguf …"
        )
    total = first.metadata.get("split.tensors.count")
    if len(parts) > 1 and isinstance(total, int) and total != len(tensors):
        raise ModelError(
            f"the parts of GGUF model {shortened(first.path.name)} hold {len(tensors)} tensors, "
            f"{total} are expected; fetch the parts again"
        )
    return Gguf(first.path.name, first.metadata, tensors)


def _files(gguf: Gguf) -> tuple[dict[str, str], tuple[str, ...]]:
    config = model_config(gguf)
    tokenizer = TokenizerFiles(gguf)
    found = {"config.json": _json(config)}
    found["generation_config.json"] = _json(_generation(gguf, config, tokenizer))
    if tokenizer.tokenizer is not None:
        found["tokenizer.json"] = json.dumps(tokenizer.tokenizer, ensure_ascii=False)
        found["tokenizer_config.json"] = _json(tokenizer.settings)
    found |= _templates(gguf)
    license = gguf.text("general.license")
    if license and _LICENSE.fullmatch(license):
        found["README.md"] = f"---\nlicense: {license}\n---\n"
    return found, (tokenizer.notice,) if tokenizer.notice else ()


def _templates(gguf: Gguf) -> dict[str, str]:
    found = {}
    for key in gguf.values:
        if key == _TEMPLATE:
            found["chat_template.jinja"] = gguf.text(key) or ""
        name = key.removeprefix(f"{_TEMPLATE}.")
        if name != key and _TEMPLATE_NAME.fullmatch(name):
            found[f"additional_chat_templates/{name}.jinja"] = gguf.text(key) or ""
    return found


def _generation(gguf: Gguf, config: dict[str, Any], tokenizer: TokenizerFiles) -> dict[str, Any]:
    """Return the tokens that begin, end and fill up texts."""
    ends = [config["eos_token_id"]]
    ends += [gguf.integer(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    template = gguf.text(_TEMPLATE) or ""
    named = {token: index for index, token in enumerate(tokenizer.tokens) if token in _TURN_ENDS}
    # Of gpt-oss "<|end|>" ends a message, and an answer has several.
    ends += [
        index
        for token, index in named.items()
        if token in template and not (token == "<|end|>" and "<|return|>" in template)
    ]
    known = [end for end in dict.fromkeys(ends) if end is not None and end < config["vocab_size"]]
    names = ("bos_token_id", "pad_token_id")
    found = {name: config[name] for name in names if config[name] is not None}
    if known:
        found["eos_token_id"] = known[0] if len(known) == 1 else known
    return found


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
