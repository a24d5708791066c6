"""The part of a prompt to read: all of it, or the rest behind a kept state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lminf_export.errors import InputError
from lminf_export.runtime.chat_template import ChatTemplate
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.runtime.text import TextCodec
from lminf_export.serve.api_errors import invalid
from lminf_export.serve.rolling import RollingHash, ids_bytes, message_bytes, messages_bytes
from lminf_export.serve.shared_beginnings import SharedBeginning
from lminf_export.serve.state_store import Conversation, ConversationKind, num_read

Messages = list[dict[str, str]]

# Characters of a system's message that is kept beside a conversation's state.
_LONGEST_SYSTEM = 2**16


@dataclass(frozen=True)
class Plan:
    """A prompt as an engine is to read it.

    Attributes:
        kind: what it was given as.
        ids: to read, behind `start`.
        start: a state to go on from, or None for a new one.
        history: of the conversation up to and with this prompt, in bytes of its kind.
        system: the system's message of a chat, if it has one.
        is_follow_up: whether it goes on a conversation.
        shared: a beginning of the prompt whose state is to be kept while it is read.
    """

    kind: ConversationKind
    ids: list[int]
    start: Snapshot | None
    history: RollingHash
    system: str | None = None
    is_follow_up: bool = False
    shared: SharedBeginning | None = None

    @property
    def num_cached(self) -> int:
        """Tokens of the prompt that need not be read."""
        return 0 if self.start is None else num_read(self.start)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, those included."""
        return self.num_cached + len(self.ids)

    def behind(self, snapshot: Snapshot) -> Plan:
        """Return the plan for the rest, given a state that has read the beginning."""
        return replace(self, ids=self.ids[num_read(snapshot) :], start=snapshot)


def plan_prompt(
    prompt: str | list[int], codec: TextCodec, conversation: Conversation | None
) -> Plan:
    """Return how a text, or token ids, are read.

    In a conversation they are what is new, or all of it from its beginning.

    Raises:
        ApiError: a conversation of another kind.
        InputError: nothing to read.
    """
    kind: ConversationKind = "text" if isinstance(prompt, str) else "ids"
    data = prompt.encode("utf-8") if isinstance(prompt, str) else ids_bytes(prompt)
    if conversation is None:
        ids = codec.encode(prompt) if isinstance(prompt, str) else prompt
        return Plan(kind, _some(ids), None, RollingHash().then(data))
    _require_kind(conversation, kind)
    if conversation.history.begins(data):
        data = data[conversation.history.length :]
        prompt = data.decode("utf-8") if isinstance(prompt, str) else _rest(prompt, data)
    ids = codec.ids(prompt) if isinstance(prompt, str) else prompt
    return _going_on(conversation, ids, conversation.history.then(data))


def plan_chat(
    messages: Messages,
    template: ChatTemplate,
    codec: TextCodec,
    conversation: Conversation | None,
) -> Plan:
    """Return how messages are read.

    In a conversation they are what is new, or all of it from its beginning. Messages that hold an
    answer or a system message, and do not begin as the conversation does, begin it anew.

    Raises:
        ApiError: a conversation of another kind, or no new message.
        InputError: messages that the template refuses.
    """
    if conversation is not None:
        _require_kind(conversation, "chat")
        new = _new_messages(messages, conversation.history)
        if new is not None:
            if not new:
                raise invalid(
                    "messages hold nothing that this session has not answered", "messages"
                )
            ids = codec.ids_behind(template.turn(new, system=conversation.system))
            return _going_on(conversation, ids, conversation.history.then(messages_bytes(new)))
    ids = codec.ids(template.render(messages))
    history = RollingHash().then(messages_bytes(messages))
    return Plan("chat", _some(ids), None, history, _system_of(messages))


def _new_messages(messages: Messages, history: RollingHash) -> Messages | None:
    """Return those of the messages that a conversation does not hold; None if it is another."""
    rolling = RollingHash()
    for place, message in enumerate(messages, 1):
        rolling = rolling.then(message_bytes(message))
        if rolling == history:
            return messages[place:]
        if rolling.length >= history.length:
            break
    return messages if all(message["role"] == "user" for message in messages) else None


def _system_of(messages: Messages) -> str | None:
    """Return the system's message that a chat begins with; not one beyond all use."""
    first = messages[0] if messages else {"role": "user"}
    if first["role"] not in ("system", "developer") or len(first["content"]) > _LONGEST_SYSTEM:
        return None
    return first["content"]


def _going_on(conversation: Conversation, ids: Sequence[int], history: RollingHash) -> Plan:
    kept = conversation.kept
    ids = _some([*kept.unread, *ids])
    return Plan(
        conversation.kind, ids, kept.snapshot, history, conversation.system, is_follow_up=True
    )


def _require_kind(conversation: Conversation, kind: ConversationKind) -> None:
    if conversation.kind != kind:
        names = {"chat": "messages", "text": "text", "ids": "token ids"}
        raise invalid(
            f"this session is of {names[conversation.kind]}, and cannot go on with {names[kind]}; "
            "delete it, or use another x-session-id"
        )


def _rest(prompt: list[int], data: bytes) -> list[int]:
    return prompt[len(prompt) - len(data) // 4 :]


def _some(ids: Sequence[int]) -> list[int]:
    if not ids:
        raise InputError("the prompt is empty; give at least one token")
    return list(ids)
