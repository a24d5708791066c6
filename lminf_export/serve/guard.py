"""A gate for every request: who sends it, how many there are, who reads too slowly."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lminf_export.serve.api_errors import ApiError
from lminf_export.serve.auth import is_open, require_key, require_known_sender
from lminf_export.serve.caller import OWNER
from lminf_export.serve.serving import Serving

logger = logging.getLogger(__name__)

# Where the server's protocol puts what ends a connection at once.
ABORT = "lminf.abort"
# What a log says of a client that went; nobody receives it.
CLIENT_CLOSED = 499
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """Middleware around all endpoints.

    Args:
        app: what it protects.
        serving: limits and counts.
        label: the endpoint of a path, for metrics.
        is_page: whether a path is a file of the page, which asks for the key itself.
    """

    def __init__(
        self,
        app: ASGIApp,
        serving: Serving,
        label: Callable[[str], str],
        is_page: Callable[[str], bool],
    ) -> None:
        self._app = app
        self._serving = serving
        self._label = label
        self._is_page = is_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        started = time.monotonic()
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_CLOSED

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await self._send(scope, send, message)

        self._serving.num_requests += 1
        try:
            try:
                self._check(scope)
            except ApiError as error:
                await error.response()(scope, receive, watched)
                return
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            status = CLIENT_CLOSED
        finally:
            self._serving.num_requests -= 1
            label = self._label(scope["path"])
            self._serving.metrics.answered(label, status)
            # The label and not the path, which a client may write lines into.
            seconds = time.monotonic() - started
            logger.info("%s %s: %d in %.3f s", scope["method"], label, status, seconds)

    def _check(self, scope: Scope) -> None:
        serving, headers = self._serving, Headers(scope=scope)
        limit = serving.settings.max_header_bytes
        if sum(len(name) + len(value) + 4 for name, value in headers.raw) > limit:
            raise ApiError(
                431, f"the headers have more than {limit} bytes", code="headers_too_large"
            )
        require_known_sender(headers, serving.settings, scope.get("client"))
        path = scope["path"]
        if is_open(path) or self._is_page(path):
            return
        scope[OWNER] = require_key(headers, serving.settings)
        limit = serving.settings.max_requests
        if scope["method"] == "POST" and serving.num_requests > limit:
            raise ApiError(
                429, f"{limit} requests are being answered", code="too_many_requests", retry=True
            )

    async def _send(self, scope: Scope, send: Send, message: Message) -> None:
        """Send; a client that reads nothing for too long is cut off."""
        try:
            async with asyncio.timeout(self._serving.settings.write_seconds):
                await send(message)
        except TimeoutError:
            abort = scope.get(ABORT)
            if abort is None:
                raise ClientDisconnect from None
            # Whoever waits for the client's going is told, and nothing more is sent.
            abort()
