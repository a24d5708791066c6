"""A store of parked sessions that several servers share."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lminf_export.errors import (
    ConfigError,
    InputError,
    ParkedSessionError,
    ParkingError,
    SessionError,
    StaleTurnError,
    require_instance,
    shown,
)
from lminf_export.operator.settings import as_number
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.parking.age import DEFAULT_MAX_AGE, SWEPT_AT, require_young
from lminf_export.runtime.parking.objects import Objects, Stored
from lminf_export.runtime.parking.open_objects import open_objects
from lminf_export.runtime.parking.parked import (
    MOST_TURN,
    Parked,
    checked_mark,
    checked_name,
    checked_turn,
    new_mark,
)
from lminf_export.runtime.parking.seal import (
    OVERHEAD,
    Header,
    Secret,
    digest,
    sealed,
    unsealed,
    unsealed_header,
)
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.runtime.snapshot_memory import most_bytes

logger = logging.getLogger(__name__)

# Beside its caches a state's file has a header, its unread tokens and labels.
_MOST_BESIDE = 1 << 21
_TRIES = 8
_PAUSE_SECONDS = 0.05


class SessionStore:
    """Sessions in a folder or a bucket, from which any server of a fleet resumes them.

    An object holds one turn of a session, and is never replaced: of two servers that answer the
    same turn, one is told so. It is sealed by HMAC with a secret of the fleet, and bound to the
    session's name, its turn and its bundle. Safe in any thread, and among processes.

    Args:
        url: a folder, or what fsspec opens, such as s3://BUCKET/PREFIX.
        secrets: the first one seals and names; sessions under the others are resumed, too.
        max_age: seconds after which a session is not resumed any more.

    Attributes:
        max_age: the same.

    Raises:
        ConfigError: no secret, or one that is too short; an age that is none.
        InputError: the folder cannot be used, or there is no such store.
        ParkingError: the store cannot be reached, or its package is not installed.
    """

    def __init__(
        self, url: str | Path, secrets: Sequence[str], *, max_age: float = DEFAULT_MAX_AGE
    ) -> None:
        if isinstance(secrets, str) or not isinstance(secrets, Sequence) or not secrets:
            raise ConfigError("secrets: expected a list of at least one session secret")
        self._secrets = [Secret(text, f"secret {n}") for n, text in enumerate(secrets, 1)]
        self.max_age = as_number("max_age", max_age)
        if not 0 < self.max_age < float("inf"):
            raise ConfigError(f"max_age={shown(max_age)}: must be seconds, above 0 and finite")
        self._objects: Objects = open_objects(url)

    def latest(self, name: str) -> int:
        """Return the number of a session's latest turn; 0 if there never was such a session.

        That a session was dropped is a turn, too, so that numbers never begin again.

        Raises:
            ParkingError: the store cannot be read.
        """
        found = self._latest(checked_name(name))
        return 0 if found is None else found[2].turn

    def is_latest(self, name: str, turn: int, mark: str) -> bool:
        """Tell whether a session still stands where it was loaded or saved.

        A number alone does not say so: a session may have begun again in a store that somebody
        emptied. No more than the head of its object is read.

        Args:
            name: of the session.
            turn: where it was.
            mark: of that turn.

        Raises:
            InputError: a number or a mark that no turn has.
            ParkingError: the store cannot be read.
        """
        turn, mark = checked_turn(turn), checked_mark(mark)
        place = self._latest(checked_name(name))
        if place is None or place[2].turn != turn:
            return False
        try:
            header = self._header(*place)
        except ParkedSessionError:
            return False  # `load` says why
        return header is not None and header.mark == mark

    def load(self, name: str, lm: LanguageModel) -> Parked | None:
        """Return where a session stands; None if there is none, or it was dropped.

        No more is read than a state of this bundle may have, and nothing of it is used before
        its seal has been checked.

        Args:
            name: of the session, as it was saved.
            lm: the bundle's model.

        Raises:
            ParkedSessionError: what stands there was changed or cut short, is another session's
                or bundle's, or is too old.
            ParkingError: the store cannot be read.
        """
        require_instance("lm", lm, LanguageModel)
        most = most_bytes(lm.bundle.manifest.contract) + _MOST_BESIDE + OVERHEAD
        for _ in range(_TRIES):
            place = self._latest(checked_name(name))
            if place is None:
                return None
            secret, key, found = place
            if found.nbytes > most:
                header = self._header(*place)
                if header is None:
                    continue
                _require_bundle(header, lm)
                raise ParkedSessionError(
                    "damaged",
                    f"the parked session has {found.nbytes} bytes; a state of this bundle has "
                    f"{most} at most",
                )
            content = self._objects.read(key, found)
            if content is not None:
                header, state = _opened(secret, key, found, content)
                return self._parked(header, state, lm) if header.nbytes else None
            # Another server has saved a later turn meanwhile, which NFS may not list at once.
            time.sleep(_PAUSE_SECONDS)
        raise ParkingError(f"turn {found.turn} of a session is gone again and again")

    def save(self, name: str, turn: int, snapshot: Snapshot, *, mark: str | None = None) -> None:
        """Save a turn of a session; the turns before it are removed.

        Args:
            name: of the session.
            turn: one more than `latest` was when its caller went on from there.
            snapshot: of one stream, with whatever labels.
            mark: of this turn, for `is_latest`: 16 hexadecimal digits that no other has. Random
                ones by default.

        Raises:
            StaleTurnError: another server has saved this turn, or dropped the session; or it does
                not stand at the turn before, as where somebody has emptied the store.
            InputError: a snapshot of several streams, or with more labels than are stored; another
                mark.
            SessionError: a snapshot that does not know its bundle.
            ParkingError: it could not be stored; the session stands where it stood.
        """
        checked_name(name)
        require_instance("snapshot", snapshot, Snapshot)
        turn = checked_turn(turn)
        mark = new_mark() if mark is None else checked_mark(mark)
        if snapshot.batch_size != 1:
            raise InputError(f"a session is one stream; this snapshot has {snapshot.batch_size}")
        state = snapshot.to_bytes()
        if len(state) > snapshot.nbytes + _MOST_BESIDE:
            raise InputError(
                f"the session's labels and unread tokens have more than {_MOST_BESIDE} bytes"
            )
        latest = self.latest(name)
        if latest != turn - 1:
            raise StaleTurnError(f"turn {turn} cannot follow turn {latest}, where the session is")
        assert snapshot.state_id is not None  # or there would be no bytes
        self._create(name, turn, snapshot.state_id, state, mark)

    def drop(self, name: str) -> bool:
        """Remove a session; tell whether there was one.

        A server that is answering it meanwhile cannot save its turn any more.

        Raises:
            ParkingError: it could not be removed.
        """
        is_removed = False
        for _ in range(_TRIES):
            place = self._latest(checked_name(name))
            if place is None:
                return is_removed
            _, key, found = place
            if found.turn >= MOST_TURN - 1:
                # No turn of ours: somebody has named a file so.
                self._objects.remove(key, found.turn)
                is_removed = True
                continue
            is_dropped = self._is_dropped(*place)
            if is_dropped is None:
                time.sleep(_PAUSE_SECONDS)
                continue
            if is_dropped:
                return is_removed
            with suppress(StaleTurnError):
                try:
                    self._create(name, found.turn + 1, "", b"", new_mark())
                except StaleTurnError:
                    raise
                except ParkingError:
                    # A full store has no room for a turn; without any, no later one is saved.
                    self._remove_all(name)
                return True
        raise ParkingError("the session is answered again and again while it is removed")

    def sweep(self) -> int:
        """Remove what is older than twice the age at which sessions expire; return how many.

        Only a folder is swept; of a bucket its lifecycle rules remove what is old.

        Raises:
            ParkingError: the folder cannot be read.
        """
        return self._objects.remove_older(SWEPT_AT * self.max_age)

    def _parked(self, header: Header, state: memoryview, lm: LanguageModel) -> Parked:
        """Return the session of an object that is as it was sealed."""
        _require_bundle(header, lm)
        require_young(header.written, self.max_age)
        try:
            snapshot = lm.snapshot_from_bytes(bytes(state))
        except SessionError as error:
            raise ParkedSessionError("damaged", str(error)) from None
        return Parked(header.turn, snapshot, header.written, header.mark)

    def _create(self, name: str, turn: int, state_id: str, state: bytes, mark: str) -> None:
        """Seal and store a turn, and remove those before it.

        Raises:
            StaleTurnError: this turn, or a later one, is another server's.
            ParkingError: it could not be stored.
        """
        secret = self._secrets[0]
        key = secret.key(name)
        size, sha256 = len(state), digest(state)
        header = Header(key, turn, state_id, time.time(), size, sha256, mark)
        content = sealed(secret, header, state)
        try:
            self._objects.create(key, turn, content)
        except ParkingError:
            # The answer of a store may have been lost, and asked for again.
            found = self._objects.read(key, Stored(turn, len(content)))
            if found is None:
                raise
            if found != content:
                raise StaleTurnError(f"turn {turn} is there already") from None
        try:
            self._settle(name, key, turn)
        except StaleTurnError:
            raise
        except ParkingError as error:
            # The turn is stored; what stands beside it is older.
            logger.warning("earlier turns of a session stay: %s", error)

    def _settle(self, name: str, key: str, turn: int) -> None:
        """Remove the turns before one that has been stored, unless it came too late.

        Of two servers that store one turn under different secrets each sees the other's, and of
        one that was slow a later turn stands already: then its own is removed.
        """
        # The own key last: whoever removed another server's turn has a later one there by then, or
        # has removed this one, too.
        keys = [*(other for other in self._keys(name) if other != key), key]
        places = [(other, self._objects.turns(other)) for other in keys]
        is_listed = any(found.turn == turn for found in places[-1][1])
        if not is_listed and self._objects.read(key, Stored(turn, 0)) is None:
            raise StaleTurnError(f"turn {turn} was removed meanwhile")
        for other, turns in places:
            if any(found.turn > turn or (found.turn == turn and other != key) for found in turns):
                with suppress(ParkingError):
                    self._objects.remove(key, turn)
                raise StaleTurnError(f"turn {turn} came behind another server's")
        for other, turns in places:
            for found in turns:
                if found.turn < turn:
                    self._objects.remove(other, found.turn)

    def _remove_all(self, name: str) -> None:
        """Remove a session's turns, its latest at last."""
        for key in self._keys(name):
            for found in self._objects.turns(key):
                self._objects.remove(key, found.turn)

    def _keys(self, name: str) -> list[str]:
        return [secret.key(name) for secret in self._secrets]

    def _header(self, secret: Secret, key: str, found: Stored) -> Header | None:
        """Return the header of an object, without the state behind it; None if it is gone.

        Raises:
            ParkedSessionError: it is damaged, or stands where it does not belong.
        """
        head = self._objects.read(key, Stored(found.turn, min(found.nbytes, OVERHEAD)))
        return None if head is None else _belonging(unsealed_header(secret, head)[0], key, found)

    def _is_dropped(self, secret: Secret, key: str, found: Stored) -> bool | None:
        """Tell whether a turn says that the session was dropped; None if it is gone."""
        if found.nbytes > OVERHEAD:
            return False
        try:
            content = self._objects.read(key, found)
            return None if content is None else not _opened(secret, key, found, content)[0].nbytes
        except (ParkedSessionError, ParkingError):  # damaged, or nobody can read it
            return False

    def _latest(self, name: str) -> tuple[Secret, str, Stored] | None:
        """Return the secret, the key and the object of a session's latest turn."""
        latest = None
        # Between two looks a session may move from one secret's name to another's.
        for _ in self._secrets:
            for secret in self._secrets:
                key = secret.key(name)
                turns = self._objects.turns(key)
                if turns and (latest is None or turns[-1].turn > latest[2].turn):
                    latest = secret, key, turns[-1]
            if latest is not None:
                break
        return latest


def _opened(secret: Secret, key: str, found: Stored, content: bytes) -> tuple[Header, memoryview]:
    """Return what an object holds, if it is sealed and stands where it belongs."""
    header, state = unsealed(secret, content)
    return _belonging(header, key, found), state


def _belonging(header: Header, key: str, found: Stored) -> Header:
    """Return a header, if its object stands where it belongs."""
    if (header.key, header.turn) != (key, found.turn):
        raise ParkedSessionError("foreign", "what is parked here is another session's")
    return header


def _require_bundle(header: Header, lm: LanguageModel) -> None:
    """Refuse a session of another bundle."""
    if header.state_id != lm.state_id:
        raise ParkedSessionError(
            "foreign",
            "the session was parked by another bundle, whose state this one cannot read",
        )
