"""Who asks: the owner of a key, and the conversation that is to go on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from starlette.requests import Request

from lminf_export.serve.api_errors import invalid
from lminf_export.serve.sessions import checked_session_id

# Where a request's owner stands in its scope: the hash of its API key.
OWNER = "lminf.owner"
_TURN = re.compile(r"[0-9]{1,12}")


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes:
        owner: hash of an API key, whose conversations nobody else has; "" without keys.
        session_id: of the conversation, or None for an answer outside of any.
        must_exist: refuse to answer without the conversation's past.
        turn: the number that the answer is to have; None for whichever it is.
        begins: the conversation begins anew, whatever its past.
        ends: the conversation is forgotten behind the answer, whose state is not kept for it.
    """

    owner: str = ""
    session_id: str | None = None
    must_exist: bool = False
    turn: int | None = None
    begins: bool = False
    ends: bool = False


def caller_of(request: Request) -> Caller:
    """Return who sends a request.

    Raises:
        ApiError: 400 for headers that say nothing clear.
    """
    named = request.headers.getlist("x-session-id")
    if len(named) > 1:
        raise invalid("x-session-id is there more than once", "x-session-id")
    session_id = checked_session_id(named[0] if named else None)
    must_exist = _must_exist(request)
    if must_exist and session_id is None:
        raise invalid("x-session-must-exist goes with an x-session-id", "x-session-must-exist")
    turn = _turn(request)
    if turn is not None and session_id is None:
        raise invalid("x-session-turn goes with an x-session-id", "x-session-turn")
    return Caller(request.scope.get(OWNER, ""), session_id, must_exist, turn)


def _must_exist(request: Request) -> bool:
    found = request.headers.getlist("x-session-must-exist")
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    wanted = {words.get(value.strip().lower()) for value in found}
    if None in wanted or len(wanted) > 1:
        raise invalid("x-session-must-exist: 1 or 0", "x-session-must-exist")
    return True in wanted


def _turn(request: Request) -> int | None:
    found = request.headers.getlist("x-session-turn")
    if not found:
        return None
    if len(found) > 1 or not _TURN.fullmatch(found[0]):
        raise invalid("x-session-turn: a number of at most 12 digits", "x-session-turn")
    return int(found[0])
