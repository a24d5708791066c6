"""The chat template of a bundle, compared with what transformers makes of the model's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lminf_export.disk import is_file, read_json
from lminf_export.errors import LminfError, ModelError
from lminf_export.export.tokenizer_texts import CHAT
from lminf_export.runtime.added_tokens import CONFIG, SIDE_FILES, role_tokens
from lminf_export.runtime.chat.files import FILE, PROCESSOR_FILE, find_template
from lminf_export.runtime.chat_template import ChatTemplate
from lminf_export.runtime.foreign_errors import foreign_errors


def check_chat(theirs: Any, copied: Path) -> list[str]:
    """Compare a chat rendered by the bundle's template with one by transformers.

    Tokens such as bos_token that transformers knows from a tokenizer's class, and no file names,
    are written into the bundle's `tokenizer_config.json`, where a template has them from.

    Args:
        theirs: transformers' tokenizer of the model.
        copied: the bundle's folder.

    Returns:
        What the user should know, one line each.
    """
    names = [name for name in (FILE, CONFIG, PROCESSOR_FILE) if is_file(copied / name)]
    try:
        found = find_template(copied, names)
        if found is None:
            return []
        _name_tokens(theirs, copied)
        for messages in (CHAT, CHAT[:1]):
            expected = _rendered(theirs, found[1], messages)
            if expected is not None:
                tokens = role_tokens(copied, SIDE_FILES)
                ours = ChatTemplate(found[1], tokens, f"the chat template in {found[0]}")
                if ours.render(messages) == expected:
                    return []
                break
        else:  # what transformers cannot render is named with its other texts
            return []
    except LminfError as error:
        return [f"no chat with this bundle: {error}"]
    return [f"the chat template in {found[0]} writes another text here than in transformers"]


def _name_tokens(theirs: Any, copied: Path) -> None:
    """Write the tokens that only a tokenizer's class names into the bundle's files."""
    known = getattr(theirs, "special_tokens_map", None)
    if not isinstance(known, dict) or not is_file(copied / CONFIG):
        return
    named = role_tokens(copied, SIDE_FILES)
    vocabulary = theirs.get_vocab()
    missing = {
        role: str(token)
        for role, token in known.items()
        if role not in named and str(token) in vocabulary
    }
    config = read_json(copied / CONFIG, ModelError, CONFIG)
    if missing and isinstance(config, dict):
        text = json.dumps({**config, **missing}, indent=2, ensure_ascii=False)
        (copied / CONFIG).write_text(f"{text}\n", encoding="utf-8")


def _rendered(theirs: Any, template: str, messages: Sequence[dict[str, str]]) -> str | None:
    """Return a chat as transformers renders it, None if it cannot."""
    try:
        with foreign_errors(ModelError, "the chat template fails"):
            text = theirs.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
    except ModelError:
        return None
    return text if isinstance(text, str) else None
