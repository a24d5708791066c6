"""How long sessions are kept."""

from __future__ import annotations

import time

from lminf_export.errors import ParkedSessionError

# Seconds.
DEFAULT_MAX_AGE = 30 * 86400.0
# A session that has expired is refused for as long again before it is removed.
SWEPT_AT = 2.0


def is_young(written: float, max_age: float) -> bool:
    """Tell whether what was written at a Unix time is not older than so many seconds."""
    return time.time() - written <= max_age


def require_young(written: float, max_age: float) -> None:
    """Refuse a session that is too old.

    Args:
        written: Unix time.
        max_age: seconds.

    Raises:
        ParkedSessionError: it has expired.
    """
    if not is_young(written, max_age):
        age = _lasting(time.time() - written)
        raise ParkedSessionError(
            "expired", f"the session was parked {age} ago, and is kept for {_lasting(max_age)}"
        )


def _lasting(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds:.1f} seconds"
