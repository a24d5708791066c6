"""A command's stream as a value: where it begins, and the file that it ends in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lminf_export.cli.signals import HeldInterrupt
from lminf_export.errors import InputError

if TYPE_CHECKING:
    from lminf_export.runtime.language_model import LanguageModel

# More than a decoder of text looks back.
_CONTEXT = 64


class KeptState:
    """A stream that may begin in a file and end in one.

    Args:
        model: what runs it.
        load: the file it begins in; None for a new stream.
        save: the file it ends in; None for none.

    Attributes:
        state: of the stream.
        prompt_ids: what is read first.
        before: ids of the text that stands before what is written.

    Raises:
        InputError: a file that cannot be read, or a place that cannot be written.
        SessionError: the file is of another bundle, or damaged.
    """

    def __init__(self, model: LanguageModel, load: str | None, save: str | None) -> None:
        from lminf_export.runtime.state_file import require_place

        if save is not None:
            require_place(save)
        self._model, self._loaded, self._save = model, load, save
        self._unread: tuple[int, ...] = ()
        self._context: tuple[int, ...] = ()
        self.state = model.new_state()
        if load is not None:
            snapshot = model.load_snapshot(load)
            if snapshot.batch_size != 1:
                raise InputError(f"{load} has {snapshot.batch_size} streams; one is continued")
            self.state.restore(snapshot)
            self._unread, self._context = snapshot.unread, snapshot.context
        self._start = self.state.furthest
        self.prompt_ids: list[int] = []
        # Each with the number of tokens given up to it: one entry says all.
        self._latest: deque[tuple[int, int]] = deque()

    @property
    def before(self) -> Sequence[int]:
        """Token ids before the text that is written, the latest of them at least."""
        return [*self._context, *self.prompt_ids]

    def begin(self, text: str | None) -> None:
        """Set the text that is read first, behind what a loaded stream has not read yet.

        Raises:
            InputError: there is nothing to read.
        """
        codec = self._model.codec
        if not (self.state.furthest or self._unread):
            self.prompt_ids = codec.encode(text or "")
        else:
            # It stands in the middle of a text, so nothing that begins one comes before it.
            self.prompt_ids = [*self._unread, *(codec.ids(text) if text else [])]
            if not self.prompt_ids:
                raise InputError(
                    f"the state in {self._loaded} has read all of its text; give a prompt"
                )
        self._latest = deque(
            enumerate(self.before, 1 - len(self._context)),
            maxlen=_CONTEXT + len(self.prompt_ids),
        )

    def watch(self, token_ids: Iterator[int]) -> Iterator[int]:
        """Pass tokens on, and keep those that the file may need.

        Where there is a file, Ctrl-C and other signals wait until the latest token is shown.
        """
        with HeldInterrupt() if self._save is not None else nullcontext() as held:
            for token in token_ids:
                self._latest.append((self._latest[-1][0] + 1, token))
                if held is not None:
                    held.hold()
                yield token
                if held is not None:
                    held.release()

    def read_prompt(self) -> None:
        """Read the prompt but its last token, for a stream that writes nothing."""
        if self._save is not None and len(self.prompt_ids) > 1:
            self._model.forward([self.prompt_ids[:-1]], self.state, logits="none")

    def save(self) -> int | None:
        """Write the file, if one is asked for; return its bytes."""
        if self._save is None:
            return None
        latest = [token for _, token in self._latest]
        read = self.state.furthest - self._start
        end = len(latest) - (self._latest[-1][0] - read)
        unread, context = tuple(latest[end:]), tuple(latest[max(0, end - _CONTEXT) : end])
        replace(self.state.snapshot(), unread=unread, context=context).save(self._save)
        return Path(self._save).expanduser().stat().st_size
