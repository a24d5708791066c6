"""A chat: lines in, answers out, and the commands that begin with a slash."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from lminf_export.bundle.files import human_bytes
from lminf_export.cli.chat_lines import Lines
from lminf_export.disk import user_path
from lminf_export.errors import InputError, LminfError

if TYPE_CHECKING:
    from lminf_export.runtime.conversation import Conversation

# Name → (argument, one line of help); the methods of `Chat` are called after them.
COMMANDS = {
    "save": ("FILE", "write the conversation's state to a file"),
    "load": ("FILE", "go on with a conversation that was saved"),
    "reset": ("", "begin anew, with the same system prompt"),
    "system": ("[TEXT]", "begin anew with this system prompt; alone: show it"),
    "stats": ("", "show position, speed and cache size"),
    "help": ("", "show this; a line that begins with // is a message that begins with /"),
    "quit": ("", "end, as Ctrl-D does; Ctrl-C only stops an answer"),
}


@dataclass(frozen=True)
class Writing:
    """How answers are written.

    Attributes:
        max_new_tokens: tokens of an answer at most.
        stop: strings that end one.
        sampling: see `LanguageModel.generate`.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)


class Chat:
    """Reads lines until there are no more, and answers them.

    Answers go to stdout, everything else to stderr.

    Args:
        conversation: with the model.
        writing: how answers are written.
        pinned: whether the sinks must hold the system prompt.
    """

    def __init__(self, conversation: Conversation, writing: Writing, *, pinned: bool) -> None:
        self._conversation, self._writing, self._pinned = conversation, writing, pinned
        self._answering = False
        self._commands: dict[str, Callable[[str], None]] = {
            "save": self._save,
            "load": self._load,
            "reset": self._reset,
            "system": self._system,
            "stats": lambda _: say(self.status),
            "help": lambda _: say(_help()),
        }

    @property
    def status(self) -> str:
        """Position, speed and cache size."""
        stream, speed = self._conversation.stream, self._conversation.last.tokens_per_second
        state = stream.state
        return (
            f"at token {stream.position:,}{f', {speed:.1f} tokens/s' if speed else ''}, "
            f"cache {human_bytes(state.nbytes)} of at most {human_bytes(state.max_nbytes)}, "
            f"{seen_tokens(self._conversation)}"
        )

    def run(self, lines: Lines) -> None:
        """Read and answer to the end.

        Raises:
            LminfError: what is wrong with a line that nobody can type again.
        """
        # From a pipe nothing is typed again: Ctrl-C ends it all there.
        answers = self._stopping_answers() if lines.is_terminal else nullcontext()
        with answers, lines.open():
            while True:
                try:
                    line = lines.read()
                    if line is None or not self._take(line):
                        return
                except LminfError as error:
                    if not lines.is_terminal:
                        raise
                    say(f"error: {error}")
                except KeyboardInterrupt:
                    if not lines.is_terminal:
                        raise
                    say("" if self._answering else "/quit or Ctrl-D ends")
                finally:
                    self._answering = False

    def _take(self, line: str) -> bool:
        """Answer a line, or do what it says; return whether the chat goes on."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, argument = line[1:].partition(" ")
            if name == "quit":
                return False
            if name not in self._commands:
                raise InputError(f"there is no command /{name}; /help shows them")
            self._commands[name](argument.strip())
        elif line.strip():
            self._answer(line[1:] if line.startswith("//") else line)
        return True

    def _answer(self, text: str) -> None:
        writing = self._writing
        self._answering = True
        pieces = self._conversation.say(
            text,
            max_new_tokens=writing.max_new_tokens,
            stop=writing.stop,
            **writing.sampling,
        )
        try:
            for piece in pieces:
                click.echo(piece, nl=False)
                sys.stdout.flush()
        finally:
            click.echo()
        if self._conversation.last.ended == "length":
            say(f"note: cut at {writing.max_new_tokens} tokens (--max-new-tokens)")
        elif self._conversation.last.ended == "stopped":
            say("stopped; what was written so far is part of the conversation")

    @contextmanager
    def _stopping_answers(self) -> Iterator[None]:
        """Let Ctrl-C end an answer behind its current token, so that nothing breaks off.

        While a question is read, or where it comes twice, it interrupts at once.
        """

        def stop(_: int, __: FrameType | None) -> None:
            conversation = self._conversation
            if not self._answering or conversation.is_reading or conversation.stop():
                raise KeyboardInterrupt

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _save(self, argument: str) -> None:
        self._conversation.save(_typed_path("/save", argument))
        say(f"saved {argument} at token {self._conversation.stream.position:,}")

    def _load(self, argument: str) -> None:
        self._conversation.load(_typed_path("/load", argument))
        say(f"loaded {argument} at token {self._conversation.stream.position:,}")

    def _reset(self, argument: str) -> None:
        if argument:
            raise InputError("/reset takes nothing; /system TEXT begins anew with another prompt")
        self._begin(self._conversation.system)

    def _system(self, text: str) -> None:
        if text:
            self._begin(text)
            return
        own = self._conversation.system or "no system prompt"
        if self._conversation.knows_system:
            say(own)
        else:
            say(f"what was loaded does not say its own; /reset begins anew with: {own}")

    def _begin(self, system: str | None) -> None:
        check_system(self._conversation, system, pinned=self._pinned)
        self._conversation.reset(system)
        say("a new conversation")


def say(text: str) -> None:
    """Print what is no answer."""
    click.echo(text, err=True)


def seen_tokens(conversation: Conversation) -> str:
    """Say which tokens a query sees."""
    settings = conversation.model.bundle.manifest.lambda_config
    return f"window {settings.window_size:,} + {settings.num_sink_tokens} sinks"


def check_system(conversation: Conversation, system: str | None, *, pinned: bool) -> None:
    """Say what of the system prompt will be forgotten, and when.

    Args:
        conversation: with the model and its template.
        system: the system prompt.
        pinned: refuse a system prompt that is not kept whole.

    Raises:
        InputError: a pinned system prompt is longer than the sinks, or the template refuses it.
    """
    settings = conversation.model.bundle.manifest.lambda_config
    sinks, length = settings.num_sink_tokens, conversation.count_system_tokens(system)
    if length <= sinks:
        return
    found = f"the system prompt has {length} tokens and this bundle keeps the first {sinks}"
    if pinned:
        raise InputError(
            f"--pin-system: {found}; export with --num-sink-tokens {length} to keep it whole"
        )
    say(
        f"note: {found}: the rest is forgotten from token {sinks + settings.window_size:,} on, "
        f"all of it at {length + settings.window_size:,}; an export with --num-sink-tokens "
        f"{length} keeps it whole"
    )


def _typed_path(command: str, argument: str) -> Path:
    """Return a path that was typed, as UTF-8 whatever this system's encoding is."""
    if not argument:
        raise InputError(f"{command} needs a file: {command} FILE")
    return user_path(os.fsdecode(argument.encode("utf-8", "surrogateescape")), InputError)


def _help() -> str:
    rows = [(f"/{name} {argument}".rstrip(), text) for name, (argument, text) in COMMANDS.items()]
    return "\n".join(f"{left:<16} {text}" for left, text in rows)
