"""Errors of conversations, as clients are told of them."""

from __future__ import annotations

import logging

from lminf_export.errors import LminfError, ParkedSessionError, ParkingError
from lminf_export.serve.api_errors import ApiError, of_ours

logger = logging.getLogger(__name__)


def conflict() -> ApiError:
    """Return what ends an answer that is no part of its conversation."""
    return ApiError(
        409,
        "another server has answered this session meanwhile, or it was deleted; this answer is no "
        "part of it",
        code="session_conflict",
    )


def not_written() -> ApiError:
    """Return what ends an answer whose conversation could not be written to its folder."""
    return ApiError(
        500,
        "the conversation could not be written and is forgotten; see the server's log",
        code="session_not_written",
    )


def not_stored(stands: str) -> ApiError:
    """Return what ends an answer whose conversation is not, or not surely, in a shared store.

    Args:
        stands: what is known of where the conversation stands.
    """
    return ApiError(
        503,
        f"the conversation could not surely be written and {stands}: ask where it stands",
        code="session_not_written",
        retry=True,
    )


def not_removed(*, is_shared: bool) -> ApiError:
    """Return what ends a deletion that was not carried out, or not surely.

    Args:
        is_shared: its conversation is in a store of other servers, where it may still stand.
    """
    stands = "is forgotten, but its files could not be removed"
    if is_shared:
        stands = "may stand: it could not surely be removed from the store"
    return ApiError(
        503 if is_shared else 500,
        f"the conversation {stands}; see the server's log",
        code="session_not_removed",
        retry=is_shared,
    )


def of_store(error: LminfError) -> ApiError:
    """Return what refuses a request whose conversation cannot be had."""
    if isinstance(error, ParkedSessionError):
        return ApiError(
            410,
            f"{error}; delete this session, or use another x-session-id",
            code=f"session_{error.reason}",
        )
    if isinstance(error, ParkingError):
        logger.warning("a conversation could not be read: %s", error)
        return ApiError(
            503,
            "the store of conversations cannot be read; see the server's log",
            code="session_store_unavailable",
            retry=True,
        )
    return of_ours(error)
