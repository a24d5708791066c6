"""Settings of a server: who may use it, and how much of what."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import urlsplit

from lminf_export.disk import require_path
from lminf_export.errors import ConfigError, shown
from lminf_export.operator.settings import as_integer, as_number
from lminf_export.runtime.batching.engine import MOST_SLOTS
from lminf_export.runtime.parking.age import DEFAULT_MAX_AGE

_ZERO_ALLOWED = {"max_waiting", "session_bytes", "session_disk_bytes", "event_seconds"}
# Above these what reads a setting refuses it, or each request, so none may be larger.
_LARGEST = {"max_logprobs": 20, "slots": MOST_SLOTS}


@dataclass(frozen=True)
class ServeSettings:
    """Limits of a server, each of which protects it from one kind of request.

    Attributes:
        api_keys: keys, one of which each request must bear; none lets everybody in.
        allow_origins: origins of pages that may use the API from a browser; none by default.
        allow_hosts: names besides localhost that a request without a key may be sent to; "*"
            stands for all. They are checked against pages whose name leads to this machine.
        slots: sequences of one model that decode side by side.
        max_waiting: sequences of one model that may wait for a slot; more get 429.
        max_requests: requests that are read or answered at once; more get 429.
        max_connections: connections at once; more are closed.
        max_prompt_tokens: tokens of one prompt.
        max_new_tokens: tokens that one answer may have.
        default_max_tokens: tokens of an answer whose request names no number.
        max_choices: prompts times `n` of one request.
        max_stops: stop strings of one request.
        max_stop_length: characters of one stop string.
        max_logprobs: likeliest tokens beside the chosen one, 20 at most.
        max_whole_tokens: tokens of all choices of an answer that is not streamed, those of its
            log probabilities included: it is held in memory until it is complete.
        max_body_bytes: bytes of a request's body.
        max_json_depth: lists and objects inside each other in a request's body.
        max_header_bytes: bytes of a request's headers.
        header_seconds: time a client may take to send its headers.
        body_seconds: time a client may take to send a body.
        write_seconds: time a client may leave what was sent unread before it is cut off.
        max_stream_seconds: time of one answer, waiting included.
        event_seconds: least time between two events of a stream; what is written sooner comes
            together, since each event costs the server as much as a small model's step.
        shutdown_seconds: time that running answers get after the first signal.
        session_folder: where conversations are kept over restarts; None keeps none.
        session_store: a store that several servers share, instead of a folder: a folder of theirs,
            or what fsspec opens, such as s3://BUCKET/PREFIX. An answer ends when its conversation
            is there.
        session_secrets: what seals the conversations of a store, the same for all its servers; the
            first one for new ones, any for those that are there.
        session_max_age: seconds after which a conversation of a folder or a store is not resumed.
        session_store_seconds: time that a store may take for one call; then a request that needs it
            is refused, although the call may still be carried out.
        session_durable: an answer ends when its conversation is in the folder.
        session_bytes: memory of kept conversations; the least recently used are dropped.
        session_disk_bytes: bytes of the folder; the oldest files are dropped.
        prefix_reuse: go on from a kept state whose tokens a prompt begins with.
        prefix_bytes: memory of those states; as much as that of all slots by default.

    Raises:
        ConfigError: naming the field and its rule.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    slots: int = 8
    max_waiting: int = 256
    max_requests: int = 512
    max_connections: int = 2048
    max_prompt_tokens: int = 131072
    max_new_tokens: int = 262144
    default_max_tokens: int = 256
    max_choices: int = 32
    max_stops: int = 16
    max_stop_length: int = 1024
    max_logprobs: int = 20
    max_whole_tokens: int = 1048576
    max_body_bytes: int = 4 << 20
    max_json_depth: int = 32
    max_header_bytes: int = 32768
    header_seconds: float = 20.0
    body_seconds: float = 60.0
    write_seconds: float = 60.0
    max_stream_seconds: float = 3600.0
    event_seconds: float = 0.04
    shutdown_seconds: float = 30.0
    session_folder: Path | None = None
    session_store: str | None = None
    session_secrets: tuple[str, ...] = field(default=(), repr=False)
    session_max_age: float = DEFAULT_MAX_AGE
    session_store_seconds: float = 30.0
    session_durable: bool = False
    session_bytes: int = 1 << 30
    session_disk_bytes: int = 16 << 30
    prefix_reuse: bool = True
    prefix_bytes: int | None = None

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.type == "int":
                least = 0 if setting.name in _ZERO_ALLOWED else 1
                object.__setattr__(self, setting.name, as_integer(setting.name, value, least))
                largest = _LARGEST.get(setting.name)
                if largest is not None and value > largest:
                    raise ConfigError(f"{setting.name}={value}: must be at most {largest}")
            elif setting.type == "int | None" and value is not None:
                object.__setattr__(self, setting.name, as_integer(setting.name, value, 0))
            elif setting.type == "float":
                seconds = as_number(setting.name, value)
                zero = setting.name in _ZERO_ALLOWED
                if not (0 < seconds < float("inf") or (zero and seconds == 0)):
                    bound = "0 at least" if zero else "above 0"
                    raise ConfigError(f"{setting.name}={shown(value)}: must be {bound} and finite")
                object.__setattr__(self, setting.name, seconds)
            elif setting.type == "tuple[str, ...]":
                object.__setattr__(self, setting.name, _texts(setting.name, value))
            elif setting.type == "bool" and not isinstance(value, bool):
                raise ConfigError(f"{setting.name}={shown(value)}: must be True or False")
        self._check_sessions()
        if not all(
            key.isascii() and key.isprintable() and key == key.strip() for key in self.api_keys
        ):
            raise ConfigError(
                "api_keys: a key has printable ASCII characters, no space at its ends"
            )
        for origin in self.allow_origins:
            if origin != "*" and not _is_origin(origin):
                raise ConfigError(
                    f"allow_origins: {shown(origin)} is no origin; expected SCHEME://HOST[:PORT], "
                    "such as https://app.example"
                )
        for host in self.allow_hosts:
            if not set(host).isdisjoint(":/@ ") and not _is_address(host):
                raise ConfigError(
                    f"allow_hosts: {shown(host)} is no name; expected one without scheme and port, "
                    "such as box.lan"
                )

    def _check_sessions(self) -> None:
        """Check where conversations are kept."""
        if self.session_store is not None:
            require_path("session_store", self.session_store, ConfigError)
            object.__setattr__(self, "session_store", str(self.session_store))
            if not self.session_store:
                raise ConfigError("session_store is empty: name a folder or a URL, or none")
            if self.session_store.startswith("memory:"):
                raise ConfigError("session_store: memory:// is of one process; name one to share")
            if self.session_folder is not None:
                raise ConfigError("session_store and session_folder: conversations are kept once")
            if not self.session_secrets:
                raise ConfigError("session_store needs session_secrets, which seal what it holds")
        elif self.session_secrets:
            raise ConfigError("session_secrets seal a session_store; there is none")
        if self.session_folder is not None:
            require_path("session_folder", self.session_folder, ConfigError)
            if not str(self.session_folder):
                raise ConfigError("session_folder is empty: name a folder, or none")
            object.__setattr__(self, "session_folder", Path(self.session_folder))
        elif self.session_durable and self.session_store is None:
            raise ConfigError("session_durable needs a session_folder to keep conversations in")


def _texts(name: str, value: object) -> tuple[str, ...]:
    """Return texts as a tuple; a text alone is not a list of its letters."""
    if not isinstance(value, tuple | list) or not all(
        isinstance(item, str) and item for item in value
    ):
        raise ConfigError(f"{name}={shown(value)}: must be a tuple of texts, none of them empty")
    return tuple(value)


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return bool(parts.scheme and parts.netloc) and text == f"{parts.scheme}://{parts.netloc}"


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
