"""HTTP connections with bounds that uvicorn lacks: time for headers, and how many there are."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from lminf_export.serve.api_errors import ApiError
from lminf_export.serve.guard import ABORT


def bounded_protocol(
    header_seconds: float, write_seconds: float, max_connections: int
) -> type[asyncio.Protocol]:
    """Return a protocol for uvicorn.

    Args:
        header_seconds: within which a request's headers must be complete, and a body's rest
            that comes after the answer.
        write_seconds: within which what is left must be read when a connection closes.
        max_connections: more are closed as they come.
    """

    class BoundedProtocol(H11Protocol):
        """Closes connections that send no request in time; lets requests end theirs at once."""

        def __init__(
            self,
            config: Config,
            server_state: ServerState,
            app_state: dict[str, Any],
            _loop: asyncio.AbstractEventLoop | None = None,
        ) -> None:
            super().__init__(config, server_state, app_state, _loop)
            self._inner = self.app
            self.app = self._with_abort
            self._due: asyncio.TimerHandle | None = None

        async def _with_abort(self, scope: Scope, receive: Receive, send: Send) -> None:
            scope[ABORT] = self.transport.abort
            await self._inner(scope, receive, send)

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.abort()
                return
            self._expect_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # Idle: no request is being answered, and the next one's headers are incomplete. A body
            # that still comes when its request has been answered has as much time.
            theirs = self.conn.their_state
            is_late = theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE
            if theirs is not h11.IDLE and not is_late:
                self._forget()
            elif self._due is None:
                self._expect_headers()

        def send_400_response(self, msg: str) -> None:
            refusal = ApiError(400, msg, code="invalid_http").response()
            headers = [*refusal.raw_headers, (b"connection", b"close")]
            parts = (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(refusal.body)),
                h11.EndOfMessage(),
            )
            for part in parts:
                self.transport.write(self.conn.send(part) or b"")
            self.transport.close()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.is_closing() and self.transport.get_write_buffer_size():
                # A connection that closes waits for its reader, who may never read.
                self.loop.call_later(write_seconds, self.transport.abort)

        def timeout_keep_alive_handler(self) -> None:
            if self.transport.get_write_buffer_size():
                self.transport.abort()
            super().timeout_keep_alive_handler()

        def _expect_headers(self) -> None:
            self._due = self.loop.call_later(header_seconds, self.transport.abort)

        def _forget(self) -> None:
            if self._due is not None:
                self._due.cancel()
                self._due = None

    return BoundedProtocol
