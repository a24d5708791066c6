"""Messages of a conversation, checked and made plain before a template sees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lminf_export.errors import InputError, shortened
from lminf_export.runtime.added_tokens import SURROGATE

ROLES = ("system", "developer", "user", "assistant")
# What a message may have beside role and content; templates of reasoning models read the second.
_OPTIONAL = ("name", "reasoning_content")

Message = dict[str, str]


def checked_messages(messages: Any) -> list[Message]:
    """Return messages with their content as text.

    Args:
        messages: list of {"role", "content"}, the role one of `ROLES`, the content a string or a
            list of {"type": "text", "text"}, which are joined. Fields that are None are left out.

    Raises:
        InputError: no messages, or one of another shape.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InputError(
            f"messages must be a list of {{'role', 'content'}}, found {type(messages).__name__}"
        )
    found = [_message(place, message) for place, message in enumerate(messages)]
    if not found:
        raise InputError("there are no messages; give at least one of the user")
    return found


def _message(place: int, message: object) -> Message:
    name = f"messages[{place}]"
    if not isinstance(message, Mapping):
        raise InputError(f"{name} must be a table with role and content, found {_short(message)}")
    fields = {key: value for key, value in message.items() if value is not None}
    role = fields.pop("role", None)
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{name}: role must be one of {', '.join(ROLES)}; found {_short(role)}")
    if "content" not in fields:
        raise InputError(f"{name}: content is missing; give a text")
    plain = {"role": role, "content": _text(f"{name}.content", fields.pop("content"))}
    for key, value in fields.items():
        if key in _OPTIONAL:
            plain[key] = _text(f"{name}.{key}", value)
        elif not isinstance(value, list | dict | str) or value:
            raise InputError(
                f"{name}: {_short(key)} cannot be read; a message has role and content, both text"
            )
    return plain


def _text(name: str, content: object) -> str:
    parts = content if isinstance(content, (list, tuple)) else [{"type": "text", "text": content}]
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise InputError(
                f"{name} must be a text or a list of parts {{'type': 'text', 'text': …}}; found "
                f"{_short(content if parts is not content else part)}"
            )
        texts.append(text)
    joined = "".join(texts)
    if SURROGATE.search(joined):
        raise InputError(f"{name} is no Unicode text: it has half a character")
    return joined


def _short(value: object) -> str:
    return shortened(repr(value)[:200], 60)
