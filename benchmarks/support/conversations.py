"""The answers that a conversation should have, whoever serves it."""

from __future__ import annotations

from typing import Any

from lminf_export.runtime.chat_template import ChatTemplate
from lminf_export.runtime.language_model import LanguageModel


def offline_turns(lm: LanguageModel, *turns: Any, count: int = 20) -> list[str]:
    """Return the answers to messages that follow each other in one state, read as they come."""
    template, state = ChatTemplate.of(lm.bundle), lm.new_state()
    answers: list[str] = []
    unread: list[int] = []
    for number, turn in enumerate(turns):
        text = template.turn(turn) if number else template.render(turn)
        ids = [*unread, *lm.codec.ids(text)]
        written = list(lm.generate(ids, max_new_tokens=count, state=state))
        unread = written[-1:] if len(written) == count else []
        answers.append("".join(lm.codec.stream(written, after=ids)))
    return answers
