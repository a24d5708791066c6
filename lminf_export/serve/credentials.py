"""Keys and secrets: of options, files and the environment."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from lminf_export.errors import InputError, shortened

logger = logging.getLogger(__name__)

KEY_VARIABLE = "LMINF_API_KEY"
SECRET_VARIABLE = "LMINF_SESSION_SECRET"
# Far beyond any list of keys.
_MOST_BYTES = 1 << 20


def keys_of(given: str | None, path: str | None) -> tuple[str, ...]:
    """Return the keys of the option, the file and the environment, of which one is enough."""
    keys = [] if given is None else [given]
    if path is not None:
        keys += _lines_of(path, "key")
    if not keys and (from_environment := os.environ.get(KEY_VARIABLE)):
        keys.append(from_environment)
    return tuple(keys)


def secrets_of(store: str | None, path: str | None) -> tuple[str, ...]:
    """Return the secrets of a shared store, of the file or else of the environment.

    Raises:
        InputError: a store without a secret, or a secret without a store.
    """
    if store is None:
        if path is not None:
            raise InputError("--session-secret-file goes with a --session-store")
        return ()
    secrets = _lines_of(path, "secret") if path is not None else []
    if not secrets:
        secrets = _lines(os.environ.get(SECRET_VARIABLE, ""))
    if not secrets:
        raise InputError(
            "--session-store needs a secret that seals what it holds: --session-secret-file, or "
            f"the variable {SECRET_VARIABLE}; make one by `openssl rand -hex 32`"
        )
    return tuple(secrets)


def _lines_of(path: str, what: str) -> list[str]:
    """Return the lines of a file that are neither empty nor comments, at least one."""
    try:
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                logger.warning("%s: every user of this machine may read it; chmod 600 it", path)
            content = file.read(_MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise InputError(
            f"cannot read {shortened(path) or 'a file without a name'}: {reason}"
        ) from None
    if len(content) > _MOST_BYTES:
        raise InputError(f"{path} has more than {_MOST_BYTES} bytes; that is no file of a {what}")
    found = _lines(text)
    if not found:
        raise InputError(f"{path} has no {what}; write one a line")
    return found


def _lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
