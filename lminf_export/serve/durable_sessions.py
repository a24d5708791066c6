"""Where conversations outlive a server: what a folder and a shared store have in common."""

from __future__ import annotations

from typing import Protocol

from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.parking.session_store import SessionStore
from lminf_export.serve.session_folder import SessionFolder
from lminf_export.serve.settings import ServeSettings
from lminf_export.serve.shared_sessions import SharedSessions
from lminf_export.serve.state_store import Conversation


class DurableSessions(Protocol):
    """Conversations by key, outside the server's memory. Safe in any thread.

    Attributes:
        is_shared: other servers write there, too, so what is in memory may be an earlier turn.
        threads: how many may write at once.
    """

    is_shared: bool
    threads: int

    def counts(self) -> tuple[int, int]:
        """Return how many conversations there are, and their bytes; 0 where it is not known."""

    def latest(self, key: str) -> int:
        """Return the number of a conversation's latest turn here; 0 where turns have no numbers.

        Raises:
            LminfError: nobody can tell.
        """

    def is_latest(self, key: str, conversation: Conversation) -> bool:
        """Tell whether a conversation in memory is what `load` would return.

        Raises:
            LminfError: nobody can tell.
        """

    def load(self, key: str, lm: LanguageModel) -> Conversation | None:
        """Return a conversation; None if there is none.

        Raises:
            LminfError: there is one that cannot be resumed, or nobody can tell.
        """

    def save(self, key: str, conversation: Conversation) -> bool:
        """Write a conversation in place of its earlier turn; tell whether there is room for it.

        Raises:
            OSError, LminfError: it could not be written, or not surely.
        """

    def drop(self, key: str) -> bool:
        """Remove a conversation; tell whether there was one.

        Raises:
            OSError, LminfError: it could not be removed.
        """

    def close(self) -> None:
        """Give back what the server holds of it."""


def open_durable_sessions(settings: ServeSettings) -> DurableSessions | None:
    """Return where a server's conversations outlive it; None if they do not.

    Raises:
        LminfError: the folder or the store cannot be used.
    """
    if settings.session_store is not None:
        secrets, max_age = settings.session_secrets, settings.session_max_age
        return SharedSessions(SessionStore(settings.session_store, secrets, max_age=max_age))
    if settings.session_folder is not None:
        return SessionFolder(
            settings.session_folder, settings.session_disk_bytes, settings.session_max_age
        )
    return None
