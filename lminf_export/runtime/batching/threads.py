"""Threads that an engine's requests depend on, so that nothing may wait in them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lminf_export.errors import SessionError


class EngineThread(threading.Thread):
    """A thread of an engine; it ends with the program."""

    def __init__(self, target: Callable[[], None], name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)


def require_other_thread(what: str) -> None:
    """Refuse to wait for an engine in one of its own threads.

    Args:
        what: the call that would wait, for the message.

    Raises:
        SessionError: this is such a thread.
    """
    if isinstance(threading.current_thread(), EngineThread):
        raise SessionError(
            f"{what} waits for the engine; a function that the engine's threads call, as "
            "Request.ends_at or that of TokenStream.when_ready, cannot wait for it"
        )
