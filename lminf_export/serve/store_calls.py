"""Calls of what may wait for a disk or a network: in threads of their own, and not without end."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from lminf_export.errors import ParkingError

logger = logging.getLogger(__name__)

_READERS = 8

Result = TypeVar("Result")


class StoreCalls:
    """Threads that call a store; those that read wait for no write.

    Args:
        threads: that write.
        limit: seconds that somebody waits for one call; None for as long as it takes.
    """

    def __init__(self, threads: int, limit: float | None) -> None:
        self._writers = ThreadPoolExecutor(threads, "lminf-sessions")
        self._readers = ThreadPoolExecutor(_READERS, "lminf-sessions-read")
        self._limit = limit

    def write(self, call: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Have a call made that changes the store; one thread makes them in order."""
        return self._writers.submit(call, *arguments)

    async def read(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """Return what a call returns that changes nothing.

        Raises:
            ParkingError: the store does not answer in time.
        """
        return await self.ended(self._readers.submit(call, *arguments), or_not_at_all=True)

    async def ended(self, call: Future[Result], *, or_not_at_all: bool = False) -> Result:
        """Return what a call returns, which goes on if nobody waits for it any more.

        Args:
            call: in a thread.
            or_not_at_all: a call that has not begun in time is not made any more.

        Raises:
            ParkingError: the store does not answer in time.
        """
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(call)), self._limit)
        except TimeoutError:
            if call.done():
                return call.result()
            if or_not_at_all:
                call.cancel()
            raise ParkingError(f"the store did not answer in {self._limit:g} seconds") from None

    def close(self) -> bool:
        """Wait for the writes that were asked for; tell whether they have ended in time."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        end = threading.Thread(target=self._end, name="lminf-close", daemon=True)
        end.start()
        end.join(self._limit)
        if end.is_alive():
            logger.warning("the store does not answer; what is not written by now is lost")
        return not end.is_alive()

    def _end(self) -> None:
        self._writers.shutdown()
        self._readers.shutdown()
