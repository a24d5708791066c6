"""Refuses a second thread while one is at work with a state."""

from __future__ import annotations

from threading import get_ident

from lminf_export.errors import InputError


class InUse:
    """A context that one thread at a time may enter; another is refused, and never waits.

    An interrupt that comes just before the context is left leaves it entered. The thread it was
    is let in again, so that it can go on.
    """

    __slots__ = ("_thread",)

    def __init__(self) -> None:
        # One entry at most: `setdefault` finds or sets it in one step that no thread divides.
        self._thread: dict[str, int] = {}

    def __enter__(self) -> None:
        me = get_ident()
        if self._thread.setdefault("", me) != me:
            raise InputError(
                "this state, or a view of it, is at work in another thread; use one state in each "
                "thread (State.fork makes some), or an Engine for many streams"
            )

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._thread.clear()
