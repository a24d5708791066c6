"""A conversation without end: one state reads what is new, and nothing is read twice."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from lminf_export.disk import parse_json
from lminf_export.errors import InputError, LminfError, SessionError, require_instance, shown
from lminf_export.runtime.chat_template import ChatTemplate, check_variables, of_system
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.one_stream import OneStream

# Digits are what no template writes in another case.
_STAND_IN = "8461973205"


# Under which a state's file says what else belongs to the conversation.
_LABEL = "conversation"
# Settings of `LanguageModel.generate` that are not the caller's.
_OWN = frozenset({"state", "stop_token_ids"})


@dataclass
class Answer:
    """How an answer went.

    Attributes:
        num_read: tokens read before it, those of the question and its template.
        num_written: tokens written.
        seconds_reading: until the first token.
        seconds_writing: from the first token to the latest.
        ended: why it ended: "end_of_text" (the model's own end), "length", "stop_text" or
            "stopped" (by `stop`); "" while it is written, and where it broke off.
    """

    num_read: int = 0
    num_written: int = 0
    seconds_reading: float = 0.0
    seconds_writing: float = 0.0
    ended: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of writing; None for fewer than two tokens."""
        if self.num_written < 2 or self.seconds_writing <= 0:
            return None
        return (self.num_written - 1) / self.seconds_writing


class Conversation:
    """Messages of a user and answers of a model, in one state of bounded size.

    The state reads a question behind all that came before, and the model's answer as it is
    written; earlier text is never rendered or read again. What the window has passed is forgotten,
    except for the sink tokens at the beginning.

    Args:
        model: the model.
        template: its chat template.
        system: the system's message; None for none.
        variables: of the template, for all messages.

    Attributes:
        stream: what has been said.
        system: the system's message that it began with.
        knows_system: False where `load` read a state that no conversation saved: `system` is then
            that of the conversation before, for `reset`.
        last: the latest answer.

    Raises:
        InputError: the template refuses a system's message or the variables.
        BundleError: the template is one behind whose answers nothing can be added.
    """

    system: str | None
    knows_system: bool
    stream: OneStream
    last: Answer
    _stop_ids: frozenset[int]

    def __init__(
        self,
        model: LanguageModel,
        template: ChatTemplate,
        *,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        require_instance("model", model, LanguageModel)
        require_instance("template", template, ChatTemplate)
        check_variables({} if variables is None else variables)
        self.model, self.template = model, template
        self._variables = dict(variables or {})
        self._given = str(self._variables)
        self._stopping = False
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Begin anew, with this system's message.

        Raises:
            InputError: the template refuses it; the conversation is as it was.
        """
        self.count_system_tokens(system)
        self._begin(OneStream(self.model), system, knows_system=True)

    def _begin(self, stream: OneStream, system: str | None, *, knows_system: bool) -> None:
        heeded = system if knows_system else None
        ends = self.template.end_ids(self.model.codec, system=heeded, **self._variables)
        stop_ids = frozenset(self.model.bundle.manifest.eos_token_ids) | ends
        # In one step: an interrupt leaves this conversation or the new one.
        self.__dict__.update(
            system=system,
            knows_system=knows_system,
            stream=stream,
            last=Answer(),
            _stop_ids=stop_ids,
        )

    def count_system_tokens(self, system: str | None) -> int:
        """Return the tokens before the first question: a system's message and its frame.

        Raises:
            InputError: the template refuses the message.
        """
        begin, question = of_system(system), _STAND_IN
        while any(question in text for text in (system or "", self.template.text, self._given)):
            question += "0"
        message = {"role": "user", "content": question}
        text = self.template.render([*begin, message], **self._variables)
        return len(self.model.codec.ids(text.partition(question)[0]))

    def save(self, path: str | Path) -> None:
        """Write the conversation to a file, in one step, with its system's message.

        Raises:
            InputError: it cannot be written there.
        """
        label = {_LABEL: json.dumps({"system": self.system})} if self.knows_system else None
        self.stream.save(path, labels=label)

    def load(self, path: str | Path) -> None:
        """Go on where a conversation of the same bundle was saved, with its system's message.

        The state of any one stream can be loaded, too.

        Raises:
            InputError: there is no such file, or the template refuses the system's message.
            SessionError: the file is damaged or of another bundle; this conversation is as it was.
        """
        stream = OneStream(self.model)
        snapshot = stream.read_file(path)
        label = snapshot.labels.get(_LABEL)
        stream.go_on(snapshot)
        if label is None:
            self._begin(stream, self.system, knows_system=False)
        else:
            self._begin(stream, _system_in(label, path), knows_system=True)

    @property
    def is_reading(self) -> bool:
        """Whether a question is being read, and nothing of its answer is there yet."""
        return not self.last.num_written and not self.last.ended

    def stop(self) -> bool:
        """End the answer that is being written behind its current token.

        Returns:
            Whether that was asked for already.
        """
        before, self._stopping = self._stopping, True
        return before

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Iterator[str]:
        """Say something; yield the answer in pieces as it is written.

        However it ends, by `stop`, an interrupt or an error too, the conversation can go on: what
        has been written is part of it, and what the state has not read yet comes first next time.

        Args:
            text: of the user.
            max_new_tokens: how many at most; None for no end but the model's.
            stop: strings that end the answer; they are not yielded, but the state has read them.
            sampling: see `LanguageModel.generate`.

        Raises:
            InputError: the template refuses the message; the conversation is as it was.
            ConfigError: a sampling setting outside its rule.
            SessionError: a step failed.
        """
        for name in _OWN & sampling.keys():
            raise InputError(f"{name}={shown(sampling[name])}: a conversation has its own")
        stream = self.stream
        before, start = stream.unread, stream.state.furthest
        stream.add(self._new_ids(text))
        ids = stream.unread
        self.last, self._stopping = Answer(num_read=len(ids)), False
        try:
            tokens = stream.write(
                max_new_tokens=max_new_tokens, stop_token_ids=self._stop_ids, **sampling
            )
            yield from self.model.codec.stream(
                self._watched(tokens, max_new_tokens), after=ids, stop=stop
            )
            self.last.ended = self.last.ended or "stop_text"
        except (LminfError, TypeError):  # TypeError: a setting that `generate` does not know
            if stream.state.furthest == start:
                stream.unread = before  # nothing was said
            raise
        finally:
            self.last.ended = self.last.ended or "stopped"

    def _watched(self, tokens: Iterator[int], limit: int | None) -> Iterator[int]:
        """Pass tokens on and count them, up to where they are asked to stop."""
        answer, begun = self.last, time.perf_counter()
        first = begun
        for token in tokens:
            now = time.perf_counter()
            answer.num_written += 1
            if answer.num_written == 1:
                first, answer.seconds_reading = now, now - begun
            answer.seconds_writing = now - first
            yield token
            if self._stopping:
                answer.ended = "stopped"
                return
        answer.ended = "length" if answer.num_written == limit else "end_of_text"

    def _new_ids(self, text: str) -> list[int]:
        """Return the token ids of what a message adds to the conversation."""
        message = {"role": "user", "content": text}
        if self.stream.position:
            system = self.system if self.knows_system else None
            new = self.template.turn([message], system=system, **self._variables)
            return self.model.codec.ids_behind(new)
        new = self.template.render([*of_system(self.system), message], **self._variables)
        return self.model.codec.ids(new)


def _system_in(label: str, path: str | Path) -> str | None:
    """Return the system's message that a file names.

    Raises:
        SessionError: it names none.
    """
    try:
        system = parse_json(label)["system"]
    except (ValueError, TypeError, KeyError):
        system = 0
    if not isinstance(system, str | NoneType):
        raise SessionError(f"{path} is damaged: it does not say its conversation's system prompt")
    return system
