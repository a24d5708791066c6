"""A server process: its socket, its signals, and an end that cuts no event in half."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from lminf_export.errors import InputError
from lminf_export.serve.protocol import bounded_protocol
from lminf_export.serve.serving import Serving
from lminf_export.serve.settings import ServeSettings

# What running streams get to send that they end, and uvicorn to close connections.
_LAST_WORDS_SECONDS = 3
_BACKLOG = 1024


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; nobody can connect yet.

    Raises:
        InputError: the address is taken, or none of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a machine"
        raise InputError(f"cannot listen at {host}:{port}: {reason}; see --host, --port") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """Return a bound socket's URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    app: FastAPI, bound: socket.socket, settings: ServeSettings, on_start: Callable[[], None]
) -> None:
    """Serve until a signal ends it: SIGTERM, SIGINT; a second one ends it at once.

    Args:
        app: from `create_app`.
        bound: from `bound_socket`; closed at the end.
        settings: the application's.
        on_start: called when requests are answered.
    """
    DrainingServer(server_config(app, settings), app.state.serving, on_start).run(sockets=[bound])


def server_config(app: FastAPI, settings: ServeSettings) -> uvicorn.Config:
    """Return how uvicorn serves an application."""
    return uvicorn.Config(
        app,
        http=bounded_protocol(
            settings.header_seconds, settings.write_seconds, settings.max_connections
        ),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        # Garbage that clients send is worth no line each.
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=True,
        backlog=_BACKLOG,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
    )


class DrainingServer(uvicorn.Server):
    """Drains before it ends: health is answered, new work refused, running answers finish."""

    def __init__(
        self, config: uvicorn.Config, serving: Serving, on_start: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._serving = serving
        self._on_start = on_start
        self._due = float("inf")
        self._engines_closed: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal; end at the second."""
        if self._serving.is_draining:
            os._exit(128 + sig)
        self._serving.is_draining = True
        self._due = time.monotonic() + self._serving.settings.shutdown_seconds

    async def on_tick(self, counter: int) -> bool:
        """Tell whether to end: when nothing runs any more, or what runs was ended."""
        if self._serving.is_draining and not self.should_exit:
            now = time.monotonic()
            if not self._serving.is_answering or now >= self._due + _LAST_WORDS_SECONDS:
                self.should_exit = True
            elif now >= self._due and self._engines_closed is None:
                # Every stream ends with an event that says so.
                self._engines_closed = asyncio.create_task(asyncio.to_thread(self._close_engines))
        return await super().on_tick(counter)

    def _close_engines(self) -> None:
        for model in self._serving.models.values():
            model.engine.close()
