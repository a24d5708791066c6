"""The form of a parked session: a header, its HMAC, and the state, which is bound to the header.

Nothing of an object is parsed before its HMAC is found to be one that this fleet's secret makes.
The header says which session and turn it is, of which bundle, and when it was written, so that an
object in another's place, or of another bundle, is refused as well as one that was changed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from dataclasses import asdict, dataclass

from lminf_export.disk import parse_json
from lminf_export.errors import ConfigError, ParkedSessionError

_FORMAT = 2
_MAGIC = b"lminf-parked\0\0\0\0"
_LENGTH = struct.Struct("<I")
_DIGEST = hashlib.sha256
_MAC_BYTES = _DIGEST().digest_size
_MOST_HEADER_BYTES = 4096
# Bytes of an object besides its state, at most.
OVERHEAD = len(_MAGIC) + _LENGTH.size + _MOST_HEADER_BYTES + _MAC_BYTES
# What a secret must have at least: that of 128 random bits in hexadecimal digits.
LEAST_SECRET = 32


class Secret:
    """A secret that the servers of a fleet share: it names and seals their objects.

    Args:
        text: at least 32 characters, random ones; space at its ends, such as the newline of a
            file, is none of it.
        name: of the secret, in what is said of it.

    Raises:
        ConfigError: it is no text, too short, or several lines.
    """

    def __init__(self, text: str, name: str = "secret") -> None:
        if not isinstance(text, str):
            raise ConfigError(f"{name} is of type {type(text).__name__}: must be text")
        text = text.strip()
        if len(text) < LEAST_SECRET:
            raise ConfigError(
                f"{name} has {len(text)} characters; a session secret has at least {LEAST_SECRET}: "
                "make one by `openssl rand -hex 32`"
            )
        if len(text.splitlines()) > 1:
            raise ConfigError(f"{name} has several lines; each is a secret of its own")
        secret = text.encode("utf-8", "surrogatepass")
        self._naming = hmac.digest(secret, b"lminf parked session: name", _DIGEST)
        self._sealing = hmac.digest(secret, b"lminf parked session: seal", _DIGEST)

    def key(self, name: str) -> str:
        """Return the key of a session's objects, which nobody can guess from its name."""
        return hmac.digest(self._naming, name.encode("utf-8", "surrogatepass"), _DIGEST).hex()

    def seal(self, header: bytes) -> bytes:
        """Return a header's HMAC."""
        return hmac.digest(self._sealing, header, _DIGEST)


@dataclass(frozen=True)
class Header:
    """The part of an object that vouches for the rest.

    Attributes:
        key: of the session.
        turn: of the session, from 1.
        state_id: of the bundle.
        written: Unix time, seconds.
        nbytes: bytes of the state.
        sha256: of the state, hexadecimal.
        mark: of this object, so that no two are equal.
        format: of the object.
    """

    key: str
    turn: int
    state_id: str
    written: float
    nbytes: int
    sha256: str
    mark: str = ""
    format: int = _FORMAT


def sealed(secret: Secret, header: Header, state: bytes) -> bytes:
    """Return an object's bytes.

    Args:
        secret: of the fleet.
        header: with `nbytes` and `sha256` of the state.
        state: as `Snapshot.to_bytes` returns it.
    """
    text = json.dumps(asdict(header), separators=(",", ":")).encode("ascii")
    signed = _MAGIC + _LENGTH.pack(len(text)) + text
    return b"".join((signed, secret.seal(signed), state))


def digest(state: bytes) -> str:
    """Return the SHA-256 of a state's bytes."""
    return _DIGEST(state).hexdigest()


def unsealed(secret: Secret, content: bytes) -> tuple[Header, memoryview]:
    """Return what an object holds: all of it is as it was sealed.

    Raises:
        ParkedSessionError: it is damaged, or another secret sealed it.
    """
    header, state = unsealed_header(secret, content)
    if len(state) != header.nbytes or _DIGEST(state).hexdigest() != header.sha256:
        raise _damaged("its state was changed or cut short")
    return header, state


def unsealed_header(secret: Secret, content: bytes) -> tuple[Header, memoryview]:
    """Return an object's header, which is as it was sealed, and what stands behind it unchecked.

    Args:
        secret: of the fleet.
        content: the object's first bytes, `OVERHEAD` at least where it has so many.

    Raises:
        ParkedSessionError: the header is damaged, or another secret sealed it.
    """
    view = memoryview(content)
    start = len(_MAGIC) + _LENGTH.size
    if len(view) < start or view[: len(_MAGIC)] != _MAGIC:
        raise _damaged("it is no parked session, or was cut short")
    (length,) = _LENGTH.unpack(view[len(_MAGIC) : start])
    end = start + length + _MAC_BYTES
    if length > _MOST_HEADER_BYTES or end > len(view):
        raise _damaged("it was cut short")
    signed, mac = view[: start + length], view[start + length : end]
    if not hmac.compare_digest(secret.seal(bytes(signed)), bytes(mac)):
        raise _damaged("it was changed, or another secret sealed it")
    # From here on the header is one that a server of this fleet wrote.
    found = parse_json(bytes(signed[start:]))
    if found.get("format") != _FORMAT:
        raise _damaged(f"its form is {found.get('format')}, this release reads {_FORMAT}")
    return Header(**found), view[end:]


def _damaged(reason: str) -> ParkedSessionError:
    return ParkedSessionError("damaged", f"the parked session cannot be resumed: {reason}")
