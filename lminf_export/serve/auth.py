"""Who may use a server: API keys, names of this machine, origins of pages."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from lminf_export.serve.api_errors import ApiError
from lminf_export.serve.settings import ServeSettings

# Served without a key: they tell nothing, or only ask for one.
_OPEN_PATHS = {"/healthz", "/readyz"}
_LOCAL_NAMES = {"localhost", "localhost.localdomain", "ip6-localhost"}


def require_key(headers: Headers, settings: ServeSettings) -> str:
    """Return the hash of the key that a request bears; "" where none is asked for.

    Raises:
        ApiError: 401.
    """
    if not settings.api_keys:
        return ""
    values = headers.getlist("authorization")
    if len(values) > 1:
        # Which of them a proxy has looked at, nobody knows.
        raise ApiError(401, "authorization is there more than once", code="invalid_api_key")
    scheme, _, found = "".join(values).partition(" ")
    given = found.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""
    # All are compared, so that the time tells nothing of which is near.
    matches = [hmac.compare_digest(given, key.encode("ascii")) for key in settings.api_keys]
    if not any(matches):
        raise ApiError(
            401,
            "a key is needed: Authorization: Bearer KEY" if not given else "this key is wrong",
            code="invalid_api_key",
        )
    return hashlib.sha256(given).hexdigest()


def require_known_sender(
    headers: Headers, settings: ServeSettings, client: tuple[str, int] | None
) -> None:
    """Refuse requests of other machines, and those that a page elsewhere makes a browser send.

    Without keys a page whose name leads to this machine could else use the server, and any page
    could make it work. Other machines write what they like into their headers: from them a request
    to localhost is refused, too. A key cannot be guessed, so with keys names do not matter.

    Args:
        headers: of the request.
        settings: keys, and names that are allowed.
        client: address and port of the request's sender; None for a socket that has none.

    Raises:
        ApiError: 403.
    """
    if settings.api_keys:
        return
    host = headers.get("host", "")
    name = _name_of(host)
    if "*" not in settings.allow_hosts and not _is_allowed(name, settings.allow_hosts):
        if not is_local(name):
            raise ApiError(
                403,
                "without an API key the server answers to localhost only; other names are those "
                "of its setting allow_hosts (--allow-host)",
                code="unknown_host",
            )
        if client is not None and not is_local(client[0]):
            raise ApiError(
                403,
                "without an API key the server answers to its own machine only",
                code="unknown_client",
            )
    origin = headers.get("origin")
    if origin is None or origin in settings.allow_origins:
        return
    if _netloc(origin) != host.lower():
        raise ApiError(
            403,
            "requests from pages of another origin are refused; others are those of the server's "
            "setting allow_origins (--allow-origin)",
            code="unknown_origin",
        )


def is_open(path: str) -> bool:
    """Return whether a path is served without a key."""
    return path in _OPEN_PATHS


def is_local(name: str) -> bool:
    """Return whether a name or address is this machine's own, which no other machine reaches."""
    if name.lower() in _LOCAL_NAMES or name.lower().endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # of a socket that takes both kinds
    return bool((mapped or address).is_loopback)


def _netloc(origin: str) -> str | None:
    """Return host and port of an origin; None for one that has none, such as "null"."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _name_of(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_allowed(name: str, allowed: tuple[str, ...]) -> bool:
    return name.lower() in {known.lower() for known in allowed}
