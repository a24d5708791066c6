"""The record that is kept beside a conversation's state: what else it takes to go on."""

from __future__ import annotations

from typing import Any

from lminf_export.bundle.manifest import Manifest
from lminf_export.errors import ParkedSessionError
from lminf_export.runtime.batching.request import Kept
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.serve.rolling import RollingHash
from lminf_export.serve.state_store import Conversation

FORMAT = 1
_MOST_UNREAD = 64


def damaged(why: str) -> ParkedSessionError:
    """Return the error of a conversation whose files are not as they were written."""
    return ParkedSessionError("damaged", f"the kept session is damaged: {why}")


def record_of(conversation: Conversation) -> dict[str, Any]:
    """Return a conversation's record, a table for JSON."""
    return {
        "format": FORMAT,
        "turn": conversation.turn,
        "kind": conversation.kind,
        "history_length": conversation.history.length,
        "history": conversation.history.digits,
        "unread": list(conversation.kept.unread),
        "system": conversation.system,
        "text_id": conversation.text_id,
    }


def require_record(record: Any, manifest: Manifest) -> None:
    """Refuse what is no record, or one of another tokenizer or chat template.

    Args:
        record: parsed JSON.
        manifest: of the bundle that is to go on.

    Raises:
        ParkedSessionError: naming the first thing that is wrong.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise damaged(f"its record is not of format {FORMAT}")
    if record.get("text_id", manifest.text_id) != manifest.text_id:
        raise ParkedSessionError(
            "foreign",
            "the session is of another bundle, with another tokenizer or chat template",
        )
    kind, length, unread = record.get("kind"), record.get("history_length"), record.get("unread")
    if kind not in ("chat", "text", "ids"):
        raise damaged("its record names no kind")
    if type(length) is not int or length < 0 or not _is_hexadecimal(record.get("history")):
        raise damaged("its record has no history")
    if (
        not isinstance(unread, list)
        or len(unread) > _MOST_UNREAD
        or not all(type(token) is int and 0 <= token < manifest.vocab_size for token in unread)
    ):
        raise damaged("its record has impossible token ids")
    turn = record.get("turn", 0)  # of an earlier release
    if type(turn) is not int or turn < 0:
        raise damaged("its record has an impossible turn")
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise damaged("its record has an impossible system message")


def conversation_of(record: dict[str, Any], snapshot: Snapshot) -> Conversation:
    """Return the conversation of a record that `require_record` has let pass, and its state.

    Raises:
        ParkedSessionError: a state of several streams.
    """
    if snapshot.batch_size != 1:
        raise damaged("its state is not one of one stream")
    history = RollingHash(record["history_length"], int(record["history"], 16))
    kept = Kept(snapshot, tuple(record["unread"]))
    fields = {name: record[name] for name in ("system", "text_id", "turn") if name in record}
    return Conversation(record["kind"], history, kept, **fields)


def _is_hexadecimal(value: Any) -> bool:
    try:
        return isinstance(value, str) and int(value, 16) >= 0
    except ValueError:
        return False
