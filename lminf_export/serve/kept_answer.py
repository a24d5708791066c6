"""The state that an answer leaves: of its conversation, or for prompts that begin with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lminf_export.runtime.batching.request import FinishReason, Kept, Token
from lminf_export.serve.planning import Plan
from lminf_export.serve.rolling import RollingHash, ids_bytes, message_bytes
from lminf_export.serve.sessions import Lease
from lminf_export.serve.state_store import Conversation, StateStore, num_read

# Ids that are not hashed yet: more than a state leaves unread.
_LATEST_IDS = 64
_HASHED_TOGETHER = 512


class AnswerKeeper(Protocol):
    """Follows an answer, and keeps the state at its end."""

    def add(self, tokens: Sequence[Token], text: str) -> None:
        """Add tokens, and the text that has become certain with them."""

    async def keep(self, kept: Kept, reason: FinishReason) -> None:
        """Keep the state at the answer's end."""


class PrefixKeeper:
    """Keeps the state for prompts that begin with what was read and written.

    Args:
        store: of states.
        scope: who may go on from it.
        prompt_ids: of the whole prompt, or of what is read behind `read`.
        read: hash of the ids that the state had read before.
    """

    def __init__(
        self,
        store: StateStore,
        scope: str,
        prompt_ids: Sequence[int],
        read: RollingHash | None = None,
    ) -> None:
        self._store = store
        self._scope = scope
        self._hash = read or RollingHash()
        self._latest = list(prompt_ids)

    def add(self, tokens: Sequence[Token], text: str) -> None:
        """Add tokens."""
        self._latest.extend(token.id for token in tokens)
        if len(self._latest) >= _LATEST_IDS + _HASHED_TOGETHER:
            self._hash_first(len(self._latest) - _LATEST_IDS)

    async def keep(self, kept: Kept, reason: FinishReason) -> None:
        """Keep the state under the ids that it has read."""
        self.keep_read(kept)

    def keep_read(self, kept: Kept) -> RollingHash | None:
        """Keep the state; return the hash of the ids that it has read, None if it is not known."""
        behind = num_read(kept.snapshot) - self._hash.length // 4
        if not 0 <= behind <= len(self._latest):
            return None
        self._hash_first(behind)
        self._store.keep_prefix(self._scope, self._hash, kept.snapshot)
        return self._hash

    def _hash_first(self, count: int) -> None:
        self._hash = self._hash.then(ids_bytes(self._latest[:count]))
        del self._latest[:count]


class SessionKeeper:
    """Keeps a conversation.

    Args:
        lease: the right to use it.
        plan: of the prompt that is answered.
        prefix: keeps the same state for prompts without a session; None to keep none.
    """

    def __init__(self, lease: Lease, plan: Plan, prefix: PrefixKeeper | None = None) -> None:
        self._lease = lease
        self._plan = plan
        self._prefix = prefix
        self._text: list[str] = []
        self._ids: list[int] = []

    def add(self, tokens: Sequence[Token], text: str) -> None:
        """Add what the conversation has more now."""
        if self._prefix is not None:
            self._prefix.add(tokens, text)
        if self._plan.kind == "ids":
            self._ids.extend(token.id for token in tokens)
        elif text:
            self._text.append(text)

    async def keep(self, kept: Kept, reason: FinishReason) -> None:
        """Let the conversation stand behind its answer."""
        if self._plan.kind == "ids":
            added = ids_bytes(self._ids)
        elif self._plan.kind == "chat":
            added = message_bytes({"role": "assistant", "content": "".join(self._text)})
        else:
            added = "".join(self._text).encode("utf-8", "surrogatepass")
        # What ended the answer is no part of it; a template writes its own end.
        unread = kept.unread[:-1] if reason == "stop_token" else kept.unread
        history = self._plan.history.then(added)
        read = self._prefix.keep_read(kept) if self._prefix is not None else None
        going_on = Kept(kept.snapshot, unread)
        plan, lease = self._plan, self._lease
        await lease.keep(
            Conversation(
                plan.kind, history, going_on, read, plan.system, lease.text_id, lease.turn + 1
            )
        )
