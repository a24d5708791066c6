"""Conversations in a store that several servers share."""

from __future__ import annotations

import json
import logging
import random
import threading
from dataclasses import replace

from lminf_export.disk import parse_json
from lminf_export.errors import LminfError, ParkedSessionError
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.parking.age import is_young
from lminf_export.runtime.parking.session_store import SessionStore
from lminf_export.serve.session_record import conversation_of, record_of, require_record
from lminf_export.serve.state_store import Conversation

logger = logging.getLogger(__name__)

_RECORD = "lminf.conversation"
_SWEEP_SECONDS = 3600.0
_LAST_SECONDS = 1.0
_FIRST_SECONDS = 60.0


class SharedSessions:
    """Conversations in a `SessionStore`: sealed objects, one for each latest turn.

    Args:
        store: of the fleet; swept from time to time.
    """

    is_shared = True
    threads = 8

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._is_closed = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="lminf-sweep", daemon=True)
        self._sweeper.start()

    def counts(self) -> tuple[int, int]:
        """Return zeros: to count what others write would take as long as to list it."""
        return 0, 0

    def latest(self, key: str) -> int:
        """Return the number of a conversation's latest turn.

        Raises:
            ParkingError: the store cannot be read.
        """
        return self._store.latest(key)

    def is_latest(self, key: str, conversation: Conversation) -> bool:
        """Tell whether a conversation in memory is the one that stands here, and not too old.

        Raises:
            ParkingError: the store cannot be read.
        """
        return is_young(conversation.written, self._store.max_age) and self._store.is_latest(
            key, conversation.turn, conversation.mark
        )

    def load(self, key: str, lm: LanguageModel) -> Conversation | None:
        """Return a conversation; None if there is none.

        Raises:
            ParkedSessionError: it was changed, is of another bundle, or is too old.
            ParkingError: the store cannot be read.
        """
        parked = self._store.load(key, lm)
        if parked is None:
            return None
        try:
            record = parse_json(parked.snapshot.labels.get(_RECORD, "null"))
            require_record(record, lm.bundle.manifest)
            found = conversation_of(record, replace(parked.snapshot, labels={}))
            return replace(found, turn=parked.turn, written=parked.written, mark=parked.mark)
        except (ValueError, ParkedSessionError) as error:
            raise ParkedSessionError(
                "foreign", f"what is parked here is no conversation of this server: {error}"
            ) from None

    def save(self, key: str, conversation: Conversation) -> bool:
        """Store a conversation's turn; the one before it is removed.

        Raises:
            StaleTurnError: another server has answered this turn, or ended the conversation.
            LminfError: it could not be stored; the conversation stands where it stood.
        """
        labels = {_RECORD: json.dumps(record_of(conversation))}
        snapshot = replace(conversation.kept.snapshot, labels=labels)
        self._store.save(key, conversation.turn, snapshot, mark=conversation.mark)
        return True

    def drop(self, key: str) -> bool:
        """Remove a conversation; tell whether there was one.

        Raises:
            ParkingError: it could not be removed.
        """
        return self._store.drop(key)

    def close(self) -> None:
        """End the thread that sweeps; one that waits for a slow folder is left to itself."""
        self._is_closed.set()
        self._sweeper.join(_LAST_SECONDS)

    def _sweep(self) -> None:
        # Replicas start together, and need not sweep together.
        self._is_closed.wait(random.uniform(0, _FIRST_SECONDS))
        while not self._is_closed.is_set():
            try:
                removed = self._store.sweep()
                if removed:
                    logger.info("%d parked turns were too old and were removed", removed)
            except LminfError as error:
                logger.warning("what is too old could not be removed: %s", error)
            self._is_closed.wait(_SWEEP_SECONDS)
