"""Prompts and messages of a request, checked."""

from __future__ import annotations

import re
from typing import Any

from lminf_export.serve.api_errors import invalid, unsupported

# Names of a message that are accepted; and those that are where they are empty, as clients send
# the messages back that they got.
_WITHOUT_EFFECT = ("name", "refusal", "annotations")
_EMPTY = ("tool_calls", "function_call", "audio", "tool_call_id", "reasoning_content")
# Lone halves of characters outside the basic plane: valid in JSON's escapes, but no text.
_SURROGATE = re.compile("[\ud800-\udfff]")


def chat_messages(value: Any) -> list[dict[str, str]]:
    """Return checked messages, each with a role and a content that is one text.

    Raises:
        ApiError: 400, naming the message.
    """
    if not isinstance(value, list) or not value:
        raise invalid("messages must be a list of at least one message", "messages")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(value)]


def _message(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise invalid(f"{place} must be an object with role and content", "messages")
    role = message.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        if role in ("tool", "function"):
            raise unsupported(f"{place}.role {role!r}")
        raise invalid(f"{place}.role must be system, user or assistant", "messages")
    _require_known(message, place, ("role", "content", *_WITHOUT_EFFECT))
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    if not isinstance(content, str):
        raise invalid(f"{place}.content must be text or a list of text parts", "messages")
    require_text(content, f"{place}.content", "messages")
    return {"role": role, "content": content}


def _part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        shown = repr(kind) if isinstance(kind, str) else "none"
        raise invalid(
            f"{place}.content has a part of type {shown}; only text is supported", "messages",
            "unsupported_parameter",
        )  # fmt: skip
    _require_known(part, f"{place}.content", ("type", "text"))
    text = part.get("text")
    if not isinstance(text, str):
        raise invalid(f"{place}.content has a text part without text", "messages")
    return text


def _require_known(table: dict[str, Any], place: str, names: tuple[str, ...]) -> None:
    """Refuse what would be ignored: other names, unless they say nothing."""
    for name, found in table.items():
        if name in names or found is None or (name in _EMPTY and not found):
            continue
        shown = repr(name[:40])
        raise invalid(f"{place} has {shown}: not supported", "messages", "unsupported_parameter")


def require_text(text: str, place: str, param: str) -> None:
    """Refuse half characters.

    Raises:
        ApiError: 400.
    """
    if _SURROGATE.search(text):
        raise invalid(f"{place} has half of a surrogate pair, which is no text", param)


def prompts_of(value: Any, vocab_size: int, most: int) -> list[str | list[int]]:
    """Return the prompts of a request: one text, several, ids of one, or of several.

    Raises:
        ApiError: 400.
    """
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif isinstance(value, list) and value:
        prompts = [value] if isinstance(value[0], int) else value
    else:
        raise invalid(
            "prompt must be a text, a list of texts, a list of token ids, or a list of such lists",
            "prompt",
        )
    if len(prompts) > most:
        raise invalid(f"prompt has {len(prompts)} prompts; at most {most}", "prompt")
    for prompt in prompts:
        if isinstance(prompt, str):
            require_text(prompt, "prompt", "prompt")
        elif isinstance(prompt, list) and type(prompt) is type(prompts[0]):
            require_ids(prompt, vocab_size, "prompt")
        else:
            raise invalid("prompt must hold texts only, or token ids only", "prompt")
    if len({type(prompt) for prompt in prompts}) > 1:
        raise invalid("prompt must hold texts only, or token ids only", "prompt")
    return prompts


def require_ids(ids: list[Any], vocab_size: int, param: str) -> None:
    """Refuse what is no token id.

    Raises:
        ApiError: 400.
    """
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise invalid(f"{param}: token ids are integers 0 … {vocab_size - 1}", param)
