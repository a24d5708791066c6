"""Server-sent events: whole events only, and nothing more once the client has gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

# A comment for clients and proxies that give up on silence.
_COMMENT = b": waiting\n\n"
_SILENCE_SECONDS = 15.0
_WRITER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
DONE = b"data: [DONE]\n\n"


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return JSON in UTF-8; half a character, which UTF-8 cannot hold, stays an escape."""
    return _WRITER.encode(content).encode("utf-8", "backslashreplace")


def event(content: Mapping[str, Any]) -> bytes:
    """Return one event."""
    return b"data: " + json_bytes(content) + b"\n\n"


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of events; their source is closed when the client goes.

    Args:
        events: whole events, one or several at a time.
        headers: besides the type.
        on_end: called at the end, however it comes.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(None, 200, {"cache-control": "no-store", **headers})
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end
        self._sent = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they or the client end."""
        try:
            await self._send(receive, send)
        finally:
            self._on_end()

    async def _send(self, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send))
        others = [
            asyncio.create_task(disconnected(receive)),
            asyncio.create_task(self._comment(send)),
        ]
        try:
            await asyncio.wait((pump, *others), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pump, *others):
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            with contextlib.suppress(asyncio.CancelledError):
                await pump

    async def _pump(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._sent = time.monotonic()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _comment(self, send: Send) -> None:
        """Send a comment in each long silence."""
        await asyncio.sleep(_SILENCE_SECONDS)
        while True:
            rest = self._sent + _SILENCE_SECONDS - time.monotonic()
            if rest > 0:
                await asyncio.sleep(rest)
                continue
            await send({"type": "http.response.body", "body": _COMMENT, "more_body": True})
            self._sent = time.monotonic()
