"""Conversations by name: one request at a time, in memory first, on a disk behind it."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections import Counter
from concurrent.futures import Future
from functools import partial

from lminf_export.errors import LminfError, ParkingError, StaleTurnError
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.serve.api_errors import ApiError, invalid
from lminf_export.serve.durable_sessions import DurableSessions
from lminf_export.serve.session_errors import (
    conflict,
    not_removed,
    not_stored,
    not_written,
    of_store,
)
from lminf_export.serve.settings import ServeSettings
from lminf_export.serve.state_store import Conversation, StateStore, StoreCounts
from lminf_export.serve.store_calls import StoreCalls

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Clients take these out of a URL, so such a session could be neither found nor deleted.
_NO_NAMES = (".", "..")
# Conversations that wait to be written hold so much memory at most; then their requests wait.
_UNWRITTEN_BYTES = 256 << 20


def checked_session_id(found: str | None) -> str | None:
    """Return a session's name as a client sent it.

    Raises:
        ApiError: 400 for a name of other characters, or too many.
    """
    if found is not None and (not _NAME.fullmatch(found) or found in _NO_NAMES):
        raise invalid("x-session-id: 1 … 128 of A-Z a-z 0-9 . _ -, and not . or ..", "x-session-id")
    return found


def session_key(model: str, owner: str, session_id: str) -> str:
    """Return the hash under which a conversation is kept.

    Args:
        model: its name.
        owner: the hash of the API key that began it.
        session_id: as the client named it.
    """
    return hashlib.sha256("\n".join((model, owner, session_id)).encode("utf-8")).hexdigest()


class Lease:
    """The use of one conversation by one request.

    Args:
        sessions: of the server.
        key: of the conversation.
        text_id: `Manifest.text_id` of its bundle.

    Attributes:
        text_id: the same.
        conversation: where it stands; None if it is new.
        turn: the number of where it stands; its next answer has one more.
    """

    def __init__(self, sessions: Sessions, key: str, text_id: str) -> None:
        self._sessions = sessions
        self._key = key
        self.text_id = text_id
        self.conversation: Conversation | None = None
        self.turn = 0
        self.is_deleted = False
        self._is_released = False

    async def keep(self, conversation: Conversation) -> None:
        """Let the conversation stand where a request has led it.

        Raises:
            ApiError: see `Sessions.keep`.
        """
        if not self.is_deleted:
            await self._sessions.keep(self._key, conversation)
        elif self._sessions.waits:
            raise conflict()

    def release(self) -> None:
        """Let another request use the conversation."""
        if not self._is_released:
            self._is_released = True
            self._sessions.release(self._key)


class Sessions:
    """The conversations of a server.

    Args:
        settings: whether an answer waits until its conversation is written, and how long a shared
            store may take.
        store: states in memory.
        durable: where conversations outlive the server; None if they do not.

    Attributes:
        waits: an answer ends when its conversation is written.
        is_stuck: a call of the store did not end before the server did.
    """

    def __init__(
        self, settings: ServeSettings, store: StateStore, durable: DurableSessions | None
    ) -> None:
        self._store = store
        self._leases: dict[str, Lease] = {}
        self._deleting: Counter[str] = Counter()
        self._unwritten: dict[str, Conversation] = {}
        self._writes: dict[str, Future[ApiError | None]] = {}
        self._lock = threading.Lock()  # of both
        self._durable = durable
        self.is_stuck = False
        # Another server goes on from what is stored, so it is stored before a client has the end.
        self.waits = settings.session_durable or (durable is not None and durable.is_shared)
        is_shared = durable is not None and durable.is_shared
        self._calls = StoreCalls(
            1 if durable is None else durable.threads,
            settings.session_store_seconds if is_shared else None,
        )

    def counts(self) -> StoreCounts:
        """Return what is kept."""
        found = self._store.counts()
        files, file_bytes = self._durable.counts() if self._durable else (0, 0)
        return StoreCounts(found.sessions, found.prefixes, found.nbytes, files, file_bytes)

    async def lease(self, key: str, lm: LanguageModel, *, begins: bool = False) -> Lease:
        """Return the use of a conversation.

        Args:
            key: of the conversation.
            lm: the model that answers.
            begins: it begins anew, so what is kept of it is not read, and need not be readable.

        Raises:
            ApiError: 409 while another request has it; 410 where what is stored of it must not be
                resumed; 503 where a shared store cannot be read.
        """
        if key in self._leases or key in self._deleting:
            by = "answered" if key in self._leases else "carried out: it is deleted"
            raise ApiError(
                409,
                f"another request of this session is being {by}; wait for its end",
                code="session_busy",
            )
        if self.waits and self._unwritten_bytes() > _UNWRITTEN_BYTES:
            raise ApiError(
                503,
                "conversations wait to be stored; come again later",
                code="session_store_unavailable",
                retry=True,
            )
        lease = self._leases[key] = Lease(self, key, lm.bundle.manifest.text_id)
        try:
            await self._find(lease, key, lm, begins)
        except LminfError as error:
            lease.release()
            raise of_store(error) from None
        except BaseException:
            lease.release()
            raise
        return lease

    async def _find(self, lease: Lease, key: str, lm: LanguageModel, begins: bool) -> None:
        durable = self._durable
        is_shared = durable is not None and durable.is_shared
        write = self._writes.get(key) if is_shared else None
        if write is not None:  # of an answer whose client has gone
            await self._calls.ended(write)
        if begins:
            if durable is not None and is_shared:
                lease.turn = await self._calls.read(durable.latest, key)
            return
        found = await self._copy(key)
        if found is None and durable is not None and is_shared:
            self._store.drop_conversation(key)
            lease.turn = await self._calls.read(durable.latest, key)
        if found is None and durable is not None and (lease.turn or not is_shared):
            found = await self._calls.read(durable.load, key, lm)
            if lease.is_deleted:
                found = None  # meanwhile
            if found is not None:
                self._store.keep_conversation(key, found)
        lease.conversation = found
        if found is not None:
            lease.turn = found.turn

    async def _copy(self, key: str) -> Conversation | None:
        """Return the copy in memory, if it is where the conversation stands."""
        found = self._store.conversation(key) or self._unwritten.get(key)
        durable = self._durable
        if found is None or durable is None:
            return found
        if durable.is_shared:
            is_latest = await self._calls.read(durable.is_latest, key, found)
        else:
            is_latest = durable.is_latest(key, found)
        return found if is_latest else None

    async def where(self, key: str, lm: LanguageModel) -> Conversation | None:
        """Return where a conversation stands, without what is being answered; None for none.

        Raises:
            ApiError: 410 and 503 as `lease`.
        """
        try:
            found = await self._copy(key)
            if found is None and self._durable is not None:
                found = await self._calls.read(self._durable.load, key, lm)
        except LminfError as error:
            raise of_store(error) from None
        return found

    def release(self, key: str) -> None:
        """End a lease."""
        self._leases.pop(key, None)

    async def keep(self, key: str, conversation: Conversation) -> None:
        """Keep a conversation in memory, and have it written.

        Raises:
            ApiError: where it is to be on the disk, and could not be written (500, or 503 by a
                shared store), or another server has answered the same turn (409).
        """
        self._store.keep_conversation(key, conversation)
        if self._durable is None:
            return
        with self._lock:
            self._unwritten[key] = conversation
            write = self._writes[key] = self._calls.write(self._write, key, conversation)
        write.add_done_callback(partial(self._written, key))
        if not self.waits and self._unwritten_bytes() <= _UNWRITTEN_BYTES:
            return
        try:
            error = await self._calls.ended(write)
        except ParkingError as slow:
            logger.warning("a conversation is not written yet: %s", slow)
            error = not_stored("may be written later")
        if self.waits and error is not None:
            raise error

    def _unwritten_bytes(self) -> int:
        return sum(c.kept.snapshot.nbytes for c in list(self._unwritten.values()))

    async def drop(self, key: str) -> bool:
        """Forget a conversation, one that is being answered included; tell if there was one.

        Raises:
            ApiError: where its files could not be removed (500), or a shared store does not answer
                (503).
        """
        # Whoever began a request meanwhile would go on from what is to be gone.
        self._deleting[key] += 1
        try:
            return await self._drop(key)
        finally:
            self._deleting[key] -= 1
            if not self._deleting[key]:
                del self._deleting[key]

    async def _drop(self, key: str) -> bool:
        lease = self._leases.get(key)
        if lease is not None:
            lease.is_deleted = True
        was_unwritten = self._unwritten.pop(key, None) is not None
        was_kept = self._store.drop_conversation(key)
        was_file = False
        if self._durable is not None:
            try:
                # Behind a write that has begun.
                write = self._writes.get(key)
                if write is not None:
                    await self._calls.ended(write)
                drop = self._calls.write(self._durable.drop, key)
                was_file = await self._calls.ended(drop, or_not_at_all=True)
            except (OSError, LminfError) as error:
                logger.warning("a conversation could not be removed: %s", error)
                if self._durable.is_shared and lease is not None:
                    lease.is_deleted = False  # the conversation stands, with what is being answered
                raise not_removed(is_shared=self._durable.is_shared) from None
            if self._durable.is_shared:
                return was_file or lease is not None  # another server may have ended it
        return was_kept or was_file or was_unwritten or lease is not None

    def close(self) -> None:
        """Write what is unwritten, and let another server use the folder."""
        self.is_stuck = not self._calls.close()
        if self._durable is not None:
            self._durable.close()

    def _write(self, key: str, conversation: Conversation) -> ApiError | None:
        """Write a conversation; return why it is not there, or None."""
        latest = self._unwritten.get(key)
        if latest is not conversation or self._durable is None:
            return None if latest is not None else conflict()  # dropped
        problem: ApiError | None = not_written()
        try:
            problem = self._saved(key, conversation, self._durable)
        finally:
            with self._lock:
                if self._unwritten.get(key) is conversation:
                    del self._unwritten[key]
            is_kept = self._store.conversation(key) is conversation
            if self.waits and problem is not None and is_kept:
                self._store.drop_conversation(key)
        return problem

    def _saved(
        self, key: str, conversation: Conversation, durable: DurableSessions
    ) -> ApiError | None:
        """Save a conversation; return what a client is told if that fails."""
        try:
            if durable.save(key, conversation):
                return None
            logger.warning(
                "a conversation of %d bytes was not written: the folder of conversations has no "
                "room for it, see --session-disk-bytes",
                conversation.kept.snapshot.nbytes,
            )
        except StaleTurnError as error:
            logger.info("a conversation was answered twice: %s", error)
            return conflict()
        except (OSError, LminfError) as error:
            logger.warning("a conversation could not be written: %s", error)
            if durable.is_shared:
                return not_stored("most likely stands before this answer")
        return not_written()

    def _written(self, key: str, write: Future[ApiError | None]) -> None:
        """Forget a write that has ended; log what its thread would else keep to itself."""
        with self._lock:
            if self._writes.get(key) is write:
                del self._writes[key]
        error = write.exception()
        if error is not None:
            logger.error("a conversation could not be written", exc_info=error)
