"""Conversations by name: one request at a time, in memory first, in a folder behind it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from concurrent.futures import Future, ThreadPoolExecutor

from lminf_export.errors import LminfError
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.serve.api_errors import ApiError, invalid
from lminf_export.serve.session_folder import SessionFolder
from lminf_export.serve.settings import ServeSettings
from lminf_export.serve.state_store import Conversation, StateStore, StoreCounts

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Conversations that wait to be written hold so much memory at most; then their requests wait.
_UNWRITTEN_BYTES = 256 << 20


def checked_session_id(found: str | None) -> str | None:
    """Return a session's name as a client sent it.

    Raises:
        ApiError: 400 for a name of other characters, or too many.
    """
    if found is not None and not _NAME.fullmatch(found):
        raise invalid("x-session-id: 1 … 128 of A-Z a-z 0-9 . _ -", "x-session-id")
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

    Attributes:
        conversation: where it stands; None if it is new.
    """

    def __init__(self, sessions: Sessions, key: str) -> None:
        self._sessions = sessions
        self._key = key
        self.conversation: Conversation | None = None
        self.is_deleted = False
        self._is_released = False

    async def keep(self, conversation: Conversation) -> None:
        """Let the conversation stand where a request has led it."""
        if not self.is_deleted:
            await self._sessions.keep(self._key, conversation)

    def release(self) -> None:
        """Let another request use the conversation."""
        if not self._is_released:
            self._is_released = True
            self._sessions.release(self._key)


class Sessions:
    """The conversations of a server.

    Args:
        settings: memory and folder.
        store: states in memory.

    Raises:
        InputError: the folder cannot be used.
    """

    def __init__(self, settings: ServeSettings, store: StateStore) -> None:
        self._store = store
        self._leases: dict[str, Lease] = {}
        self._unwritten: dict[str, Conversation] = {}
        self._folder: SessionFolder | None = None
        if settings.session_folder is not None:
            self._folder = SessionFolder(settings.session_folder, settings.session_disk_bytes)
        self._is_durable = settings.session_durable
        self._writer = ThreadPoolExecutor(1, "lminf-sessions")

    def counts(self) -> StoreCounts:
        """Return what is kept."""
        found = self._store.counts()
        files, file_bytes = self._folder.counts() if self._folder else (0, 0)
        return StoreCounts(found.sessions, found.prefixes, found.nbytes, files, file_bytes)

    async def lease(self, key: str, lm: LanguageModel) -> Lease:
        """Return the use of a conversation.

        Raises:
            ApiError: 409 while another request has it.
        """
        if key in self._leases:
            raise ApiError(
                409,
                "another request of this session is being answered; wait for its end",
                code="session_busy",
            )
        lease = self._leases[key] = Lease(self, key)
        try:
            found = self._store.conversation(key) or self._unwritten.get(key)
            if found is None and self._folder is not None:
                found = await asyncio.to_thread(self._folder.load, key, lm)
                if lease.is_deleted:
                    found = None  # meanwhile
                if found is not None:
                    self._store.keep_conversation(key, found)
        except BaseException:
            lease.release()
            raise
        lease.conversation = found
        return lease

    def release(self, key: str) -> None:
        """End a lease."""
        self._leases.pop(key, None)

    async def keep(self, key: str, conversation: Conversation) -> None:
        """Keep a conversation in memory, and have it written.

        Raises:
            ApiError: 500 where it is to be on the disk and could not be written; it is forgotten.
        """
        self._store.keep_conversation(key, conversation)
        if self._folder is None:
            return
        self._unwritten[key] = conversation
        write = self._writer.submit(self._write, key, conversation)
        write.add_done_callback(_report)
        waiting = sum(c.kept.snapshot.nbytes for c in list(self._unwritten.values()))
        if not self._is_durable and waiting <= _UNWRITTEN_BYTES:
            return
        # A client that goes meanwhile does not stop the writing.
        is_written = await asyncio.shield(asyncio.wrap_future(write))
        if self._is_durable and not is_written:
            raise ApiError(
                500,
                "the conversation could not be written and is forgotten; see the server's log",
                code="session_not_written",
            )

    async def drop(self, key: str) -> bool:
        """Forget a conversation, one that is being answered included; tell if there was one.

        Raises:
            ApiError: 500 where its files could not be removed.
        """
        lease = self._leases.get(key)
        if lease is not None:
            lease.is_deleted = True
        was_unwritten = self._unwritten.pop(key, None) is not None
        was_kept = self._store.drop_conversation(key)
        was_file = False
        if self._folder is not None:
            # Behind a write that has begun.
            drop = self._writer.submit(self._folder.drop, key)
            try:
                was_file = await asyncio.shield(asyncio.wrap_future(drop))
            except OSError as error:
                logger.warning("a conversation could not be removed: %s", error)
                raise ApiError(
                    500,
                    "the conversation is forgotten, but its files could not be removed; see the "
                    "server's log",
                    code="session_not_removed",
                ) from None
        return was_kept or was_file or was_unwritten or lease is not None

    def close(self) -> None:
        """Write what is unwritten, and let another server use the folder."""
        self._writer.shutdown()
        if self._folder is not None:
            self._folder.close()

    def _write(self, key: str, conversation: Conversation) -> bool:
        """Write a conversation; tell whether it is there, or need not be."""
        # What came later, or was dropped, is not written.
        if self._unwritten.get(key) is not conversation or self._folder is None:
            return True
        is_written = False
        try:
            is_written = self._folder.save(key, conversation)
            if not is_written:
                logger.warning(
                    "a conversation of %d bytes was not written: the folder of conversations has "
                    "no room for it, see --session-disk-bytes",
                    conversation.kept.snapshot.nbytes,
                )
        except (OSError, LminfError) as error:
            logger.warning("a conversation could not be written: %s", error)
            # What stands there is an earlier turn: better none than a past without the latest.
            self._folder.forget(key)
        if self._unwritten.get(key) is conversation:
            del self._unwritten[key]
        if self._is_durable and not is_written and self._store.conversation(key) is conversation:
            self._store.drop_conversation(key)
        return is_written


def _report(write: Future[bool]) -> None:
    """Log what a thread would else keep to itself."""
    error = write.exception()
    if error is not None:
        logger.error("a conversation could not be written", exc_info=error)
