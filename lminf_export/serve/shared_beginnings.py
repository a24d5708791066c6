"""Beginnings that prompts have in common, a system prompt for one: their states are kept.

A prompt is known by the hashes of its beginnings of one chunk, two chunks and so on. Where a later
one begins alike, the state behind the longest such beginning is kept while it is read, and the next
one goes on from there. Of many that come at once the second, the fourth, the eighth and so on keep
it, since each copy takes the engine's time. The state is one that reading any of them leaves, bit
for bit, since prompts are cut there anyway.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from lminf_export.runtime.snapshot import Snapshot
from lminf_export.serve.rolling import RollingHash, ids_bytes
from lminf_export.serve.state_store import StateStore

# Hashes that are known at once.
_MOST_KNOWN = 16384


class SharedBeginnings:
    """The beginnings that prompts have had; those that were seen last, safe in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Beginning → prompts that had it.
        self._known: OrderedDict[tuple[str, RollingHash], int] = OrderedDict()

    def note(self, scope: str, ids: Sequence[int], chunk_size: int) -> RollingHash | None:
        """Note the beginnings of a prompt; return the longest whose state it is to keep.

        Args:
            scope: whose prompts are compared.
            ids: of the whole prompt; a beginning is shorter than that.
            chunk_size: tokens; beginnings are multiples of it.
        """
        data, step = ids_bytes(ids), 4 * chunk_size
        longest, rolling = None, RollingHash()
        beginnings = []
        for end in range(step, len(data), step):
            rolling = rolling.then(data[end - step : end])
            beginnings.append((scope, rolling))
        with self._lock:
            for key in beginnings:
                prompts = self._known[key] = self._known.get(key, 0) + 1
                self._known.move_to_end(key)
                if prompts > 1 and prompts.bit_count() == 1:
                    longest = key[1]
            while len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
        return longest


@dataclass(frozen=True)
class SharedBeginning:
    """A beginning of a prompt, of which the state is to be kept.

    Attributes:
        store: where.
        scope: who may go on from it.
        read: hash of its ids' bytes.
        num_tokens: tokens of it that are still to be read.
    """

    store: StateStore
    scope: str
    read: RollingHash
    num_tokens: int

    def keep(self, snapshot: Snapshot) -> None:
        """Keep the state behind it."""
        self.store.keep_prefix(self.scope, self.read, snapshot)
