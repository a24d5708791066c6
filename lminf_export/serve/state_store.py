"""States kept in memory: conversations, and prompts that others may begin with; LRU by bytes."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from lminf_export.runtime.batching.request import Kept
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.serve.rolling import RollingHash, ids_bytes

# Whether a conversation is one of messages, of text, or of token ids.
ConversationKind = Literal["chat", "text", "ids"]
# Of an entry besides its caches, at most; so many tiny states are bounded, too.
_ENTRY_BYTES = 4096


@dataclass(frozen=True)
class Conversation:
    """Where a conversation stands.

    Attributes:
        kind: by what it goes on.
        history: of all its messages, text or ids, answers included.
        kept: the state to go on from.
    """

    kind: ConversationKind
    history: RollingHash
    kept: Kept

    @property
    def num_tokens(self) -> int:
        """Tokens that its state has read."""
        return num_read(self.kept.snapshot)


@dataclass(frozen=True)
class StoreCounts:
    """Kept states at one moment: in memory, and as files."""

    sessions: int = 0
    prefixes: int = 0
    nbytes: int = 0
    files: int = 0
    file_bytes: int = 0


def num_read(snapshot: Snapshot) -> int:
    """Return how many tokens a snapshot's first stream has read."""
    return int(snapshot.past_length[0])


class StateStore:
    """Kept states, the least recently used of which make room; safe in any thread.

    Args:
        max_bytes: of all of them; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Conversation | Snapshot] = OrderedDict()
        self._nbytes = 0
        self._num_sessions = 0
        # Who asks → lengths in bytes of the beginnings that are kept for it.
        self._lengths: dict[str, Counter[int]] = {}

    def counts(self) -> StoreCounts:
        """Return what is kept in memory."""
        with self._lock:
            sessions = self._num_sessions
            return StoreCounts(sessions, len(self._entries) - sessions, self._nbytes)

    def conversation(self, key: str) -> Conversation | None:
        """Return a conversation, which is now the latest used."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found if isinstance(found, Conversation) else None

    def keep_conversation(self, key: str, conversation: Conversation) -> None:
        """Keep a conversation instead of what stood under its key."""
        with self._lock:
            self._put(key, conversation)

    def drop_conversation(self, key: str) -> bool:
        """Forget a conversation; tell whether there was one."""
        with self._lock:
            return self._take(key)

    def keep_prefix(self, scope: str, prefix: RollingHash, snapshot: Snapshot) -> None:
        """Keep a state for prompts that begin with the tokens it has read.

        Args:
            scope: who may go on from it.
            prefix: of the bytes of the ids that it has read.
            snapshot: of one stream.
        """
        with self._lock:
            self._put((scope, prefix), snapshot)

    def longest_prefix(self, scope: str, ids: Sequence[int]) -> Snapshot | None:
        """Return the state that has read most of a prompt, but not all of it."""
        with self._lock:
            lengths = sorted(self._lengths.get(scope, ()))
        data = ids_bytes(ids)
        prefix, prefixes = RollingHash(), []
        for length in lengths:
            if length >= len(data):
                break
            prefix = prefix.then(data[prefix.length : length])
            prefixes.append(prefix)
        with self._lock:
            for prefix in reversed(prefixes):
                found = self._entries.get((scope, prefix))
                if isinstance(found, Snapshot):
                    self._entries.move_to_end((scope, prefix))
                    return found
        return None

    def _put(self, key: Hashable, entry: Conversation | Snapshot) -> None:
        self._take(key)
        size = _size(entry)
        if size > self._max_bytes:
            return
        while self._nbytes + size > self._max_bytes:
            self._take(next(iter(self._entries)))
        self._entries[key] = entry
        self._nbytes += size
        if isinstance(key, tuple):
            scope, prefix = key
            self._lengths.setdefault(scope, Counter())[prefix.length] += 1
        else:
            self._num_sessions += 1

    def _take(self, key: Hashable) -> bool:
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self._nbytes -= _size(entry)
        if isinstance(key, tuple):
            scope, prefix = key
            lengths = self._lengths[scope]
            lengths[prefix.length] -= 1
            if not lengths[prefix.length]:
                del lengths[prefix.length]
            if not lengths:
                del self._lengths[scope]
        else:
            self._num_sessions -= 1
        return True


def _size(entry: Conversation | Snapshot) -> int:
    snapshot = entry.kept.snapshot if isinstance(entry, Conversation) else entry
    return snapshot.nbytes + _ENTRY_BYTES
