"""Reading a request's body: bytes, time and depth are bounded while they arrive."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from lminf_export.serve.api_errors import ApiError, invalid
from lminf_export.serve.settings import ServeSettings

# A client that sends too much reads no answer while it sends: so much more is thrown away first.
_DISCARDED = 8
# Of an integer; Python's own limit is larger, and its words are about Python.
_MOST_DIGITS = 400
_DISCARD_SECONDS = 5.0
# Larger bodies are parsed in a thread.
_AT_ONCE = 16384


async def read_json(request: Request, settings: ServeSettings) -> dict[str, Any]:
    """Return the JSON object that a request's body is.

    Raises:
        ApiError: 413 for too many bytes, 415 for compressed ones, 408 for too slow a client, 400
            for anything but an object of JSON in UTF-8, or one too deep.
        ClientDisconnect: the client has gone.
    """
    body = await _read(request, settings)
    if len(body) <= _AT_ONCE:
        return parsed(body, settings.max_json_depth)
    return await asyncio.to_thread(parsed, body, settings.max_json_depth)


async def _read(request: Request, settings: ServeSettings) -> bytes:
    limit = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    encoding = request.headers.get("content-encoding", "").strip().lower()
    try:
        async with asyncio.timeout(settings.body_seconds):
            if encoding not in ("", "identity"):
                await _discard(request, 0, limit)
                raise ApiError(
                    415,
                    "compressed bodies are not read: leave content-encoding out",
                    code="body_encoded",
                )
            if declared.isdecimal() and int(declared[:20]) > limit:
                # Whoever waits for "100 Continue" has sent nothing yet.
                if "expect" not in request.headers:
                    await _discard(request, int(declared[:20]), limit)
                _refuse(limit)
            body = bytearray()
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    await _discard(request, 0, limit)
                    _refuse(limit)
            return bytes(body)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive in {settings.body_seconds:g} s", code="slow_body"
        ) from None


async def _discard(request: Request, declared: int, limit: int) -> None:
    """Throw away what still comes, within bounds, so that the client reads its answer."""
    if declared > _DISCARDED * limit:
        return
    taken, end = 0, time.monotonic() + _DISCARD_SECONDS
    while taken <= _DISCARDED * limit and time.monotonic() < end:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        taken += len(message.get("body", b""))
        if not message.get("more_body", False):
            return


def _refuse(limit: int) -> NoReturn:
    raise ApiError(
        413, f"the body has more than {limit} bytes, which is the limit", code="body_too_large"
    )


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; which of two values of one name is meant would be a guess."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in an object twice")
    return found


def parsed(body: bytes, max_depth: int) -> dict[str, Any]:
    """Return the object that bytes of JSON spell.

    Raises:
        ApiError: see `read_json`.
    """
    try:
        found = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_int=_integer,
            object_pairs_hook=_once_each,
        )
    except RecursionError:
        raise _too_deep(max_depth) from None
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from None
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    level: list[Any] = [found]
    for _ in range(max_depth):
        level = [
            item
            for parent in level
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, dict | list)
        ]
        if not level:
            return found
    raise _too_deep(max_depth)


def _too_deep(limit: int) -> ApiError:
    return invalid(f"the body nests deeper than {limit} levels", code="invalid_json")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
