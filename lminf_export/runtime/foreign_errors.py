"""Errors of libraries that raise nothing narrower than Exception, named by us."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lminf_export.errors import LminfError

_SHOWN = 160


@contextmanager
def foreign_errors(kind: type[LminfError], found: str) -> Iterator[None]:
    """Raise an error of ours for whatever the block raises that is not one already.

    A panic of a library in Rust is no Exception to Python; it is one here.

    Args:
        kind: the error to raise.
        found: the beginning of its message; the library's reason follows.
    """
    try:
        yield
    except LminfError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= _SHOWN else reason[: _SHOWN - 1] + "…"
        raise kind(f"{found}: {reason}") from None
