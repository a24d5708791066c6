"""Log probabilities as OpenAI's two endpoints list them."""

from __future__ import annotations

from typing import Any

from lminf_export.runtime.token_bytes import TokenBytes
from lminf_export.serve.answer_text import Placed

# JSON has no infinity; OpenAI's API puts this for a token that is impossible.
_LEAST = -9999.0


def chat_logprobs(tokens: list[Placed], names: TokenBytes) -> dict[str, Any]:
    """Return the object of a chat's choice."""
    content = []
    for placed in tokens:
        token = placed.token
        entry = _chat_entry(token.id, token.logprob, names)
        entry["top_logprobs"] = [_chat_entry(i, logprob, names) for i, logprob in token.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: list[Placed], names: TokenBytes) -> dict[str, Any]:
    """Return the object of a completion's choice; offsets are characters of its text."""
    tops = []
    for placed in tokens:
        token = placed.token
        top = {token_name(i, names): _finite(logprob) for i, logprob in token.top}
        # The chosen token is always among them.
        top.setdefault(token_name(token.id, names), _finite(token.logprob))
        tops.append(top)
    return {
        "tokens": [token_name(placed.token.id, names) for placed in tokens],
        "token_logprobs": [_finite(placed.token.logprob) for placed in tokens],
        "top_logprobs": tops,
        "text_offset": [placed.offset for placed in tokens],
    }


def token_name(token: int, names: TokenBytes) -> str:
    r"""Return a token as text; one that is part of a character as `bytes:\xe2\x82`."""
    found = names.of(token)
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def _chat_entry(token: int, logprob: float | None, names: TokenBytes) -> dict[str, Any]:
    return {
        "token": token_name(token, names),
        "logprob": _finite(logprob),
        "bytes": list(names.of(token)),
    }


def _finite(logprob: float | None) -> float:
    return _LEAST if logprob is None else max(logprob, _LEAST)
