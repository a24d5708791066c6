"""Messages in the words of Triton's clients: the server's own speak of headers and options."""

from __future__ import annotations

import re

from lminf_export.errors import LminfError
from lminf_export.serve.api_errors import ApiError

_ANEW = "begin it anew by START, or use another sequence id"
_BY_CODE = {
    "session_not_found": "this sequence is not kept: it never was, has ended, or made room for "
    "others; begin it by START, with the whole text",
}
# From the longer to the shorter.
_WORDS = (
    ("delete it, or use another x-session-id", _ANEW),
    ("delete this session, or use another x-session-id", _ANEW),
    ("x-session-id", "sequence id"),
    ("this session", "this sequence"),
    ("a session goes on", "a sequence goes on"),
)
_OPTION = re.compile(r"--(session-[a-z-]+)")


def told(error: ApiError | LminfError) -> str:
    """Return an error's one line in the words that Triton's clients and configurations have."""
    if isinstance(error, ApiError):
        text = _BY_CODE.get(error.code or "", error.message)
    else:
        text = str(error)
    for ours, theirs in _WORDS:
        text = text.replace(ours, theirs)
    return _OPTION.sub(lambda found: f"parameter {found[1].replace('-', '_')}", text)
