"""States kept in memory: conversations, and prompts that others may begin with; LRU by bytes."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from lminf_export.runtime.batching.request import Kept
from lminf_export.runtime.parking.parked import new_mark
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.serve.rolling import RollingHash, ids_bytes

# Whether a conversation is one of messages, of text, or of token ids.
ConversationKind = Literal["chat", "text", "ids"]
# Of an entry besides its caches, at most; so many tiny states are bounded, too.
ENTRY_BYTES = 4096

Key = TypeVar("Key", bound=Hashable)
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Conversation:
    """Where a conversation stands.

    Attributes:
        kind: by what it goes on.
        history: of all its messages, text or ids, answers included.
        kept: the state to go on from.
        read: hash of the bytes of the ids that the state has read; None if it is not known.
        system: the system's message of a chat, which its template may heed at every turn.
        text_id: `Manifest.text_id` of the bundle whose text it is.
        turn: a number that grows with every answer; in a shared store also if it was deleted.
        written: Unix time of that answer's end.
        mark: what tells this turn from another of its number.
    """

    kind: ConversationKind
    history: RollingHash
    kept: Kept
    read: RollingHash | None = None
    system: str | None = None
    text_id: str = ""
    turn: int = 0
    written: float = field(default_factory=time.time, compare=False)
    mark: str = field(default_factory=new_mark, compare=False)

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
        session_bytes: of all conversations; 0 keeps none.
        prefix_bytes: of all states that prompts go on from; 0 keeps none.
    """

    def __init__(self, session_bytes: int, prefix_bytes: int) -> None:
        self._lock = threading.Lock()
        self._sessions: _Latest[str, Conversation] = _Latest(session_bytes)
        self._prefixes: _Latest[tuple[str, RollingHash], Snapshot] = _Latest(prefix_bytes)
        # Who asks → lengths in bytes of the beginnings that are kept for it.
        self._lengths: dict[str, Counter[int]] = {}

    def counts(self) -> StoreCounts:
        """Return what is kept in memory."""
        with self._lock:
            sessions, prefixes = self._sessions, self._prefixes
            return StoreCounts(
                len(sessions.entries), len(prefixes.entries), sessions.nbytes + prefixes.nbytes
            )

    def conversation(self, key: str) -> Conversation | None:
        """Return a conversation, which is now the latest used."""
        with self._lock:
            return self._sessions.get(key)

    def keep_conversation(self, key: str, conversation: Conversation) -> None:
        """Keep a conversation instead of what stood under its key."""
        with self._lock:
            size = conversation.kept.snapshot.nbytes + 4 * len(conversation.system or "")
            self._sessions.put(key, conversation, size)

    def drop_conversation(self, key: str) -> bool:
        """Forget a conversation; tell whether there was one."""
        with self._lock:
            return self._sessions.take(key)

    def keep_prefix(self, scope: str, prefix: RollingHash, snapshot: Snapshot) -> None:
        """Keep a state for prompts that begin with the tokens it has read.

        Args:
            scope: who may go on from it.
            prefix: of the bytes of the ids that it has read.
            snapshot: of one stream.
        """
        key = (scope, prefix)
        with self._lock:
            is_new = key not in self._prefixes.entries
            dropped = self._prefixes.put(key, snapshot, snapshot.nbytes)
            if is_new:
                self._lengths.setdefault(scope, Counter())[prefix.length] += 1
            for old_scope, old in dropped:
                lengths = self._lengths[old_scope]
                lengths[old.length] -= 1
                if not lengths[old.length]:
                    del lengths[old.length]
                if not lengths:
                    del self._lengths[old_scope]

    def longest_prefix(self, scope: str, ids: Sequence[int]) -> Snapshot | None:
        """Return the state that has read most of a prompt, but not all of it."""
        with self._lock:
            lengths = sorted(self._lengths.get(scope, ()))
        if not lengths:
            return None
        data = ids_bytes(ids)
        prefix, prefixes = RollingHash(), []
        for length in lengths:
            if length >= len(data):
                break
            prefix = prefix.then(data[prefix.length : length])
            prefixes.append(prefix)
        with self._lock:
            found = (self._prefixes.get((scope, prefix)) for prefix in reversed(prefixes))
            return next((snapshot for snapshot in found if snapshot is not None), None)


class _Latest(Generic[Key, Entry]):
    """The entries that were used last, up to a number of bytes.

    Args:
        max_bytes: of all of them.

    Attributes:
        entries: the latest used last.
        nbytes: of all of them.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._sizes: dict[Key, int] = {}
        self.entries: OrderedDict[Key, Entry] = OrderedDict()
        self.nbytes = 0

    def get(self, key: Key) -> Entry | None:
        """Return an entry, which is now the latest used."""
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def put(self, key: Key, entry: Entry, nbytes: int) -> list[Key]:
        """Keep an entry; return the keys of those that were dropped for it, or itself."""
        self.take(key)
        self.entries[key] = entry
        self._sizes[key] = nbytes + ENTRY_BYTES
        self.nbytes += nbytes + ENTRY_BYTES
        if nbytes + ENTRY_BYTES > self._max_bytes:
            self.take(key)
            return [key]
        dropped = []
        while self.nbytes > self._max_bytes:
            dropped.append(next(iter(self.entries)))
            self.take(dropped[-1])
        return dropped

    def take(self, key: Key) -> bool:
        """Drop an entry; tell whether there was one."""
        if key not in self.entries:
            return False
        del self.entries[key]
        self.nbytes -= self._sizes.pop(key)
        return True
