"""One stream of a model, and the tokens that it was given and has not read yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lminf_export.errors import InputError, require_instance
from lminf_export.operator.settings import as_integer
from lminf_export.runtime.inputs import listed_ids
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.snapshot import Snapshot


class OneStream:
    """A stream that is read and written by turns; whatever interrupts it, no token is lost.

    Args:
        model: the model.

    Attributes:
        state: of the stream.

    Raises:
        InputError: no model.
        SessionError: see `LanguageModel.new_state`.
    """

    def __init__(self, model: LanguageModel) -> None:
        require_instance("model", model, LanguageModel)
        self._model = model
        self.state = model.new_state()
        # Token ids, and where the state stood when they began to be read: the state's own count
        # says what it has read of them.
        self._given: tuple[list[int], int] = ([], 0)

    @property
    def unread(self) -> list[int]:
        """Token ids that the state has yet to read, before anything new."""
        ids, start = self._given
        # Whoever has put the state back has unread all of them.
        return ids[max(0, self.state.furthest - start) :]

    @unread.setter
    def unread(self, token_ids: Sequence[int]) -> None:
        ids = listed_ids(token_ids, "token_ids", self._model.vocab_size)
        self._given = (ids, self.state.furthest)

    @property
    def position(self) -> int:
        """Tokens of the stream so far."""
        return self.state.furthest + len(self.unread)

    def add(self, token_ids: Sequence[int]) -> None:
        """Put tokens behind the stream; they are read when more is written, or by `read`.

        Raises:
            InputError: no token ids, or one outside the vocabulary.
        """
        ids = listed_ids(token_ids, "token_ids", self._model.vocab_size)
        self._given = ([*self.unread, *ids], self.state.furthest)

    def read(self, keep: int = 1) -> None:
        """Read what was added, except for its last tokens.

        Args:
            keep: how many stay unread; one at least is needed to write behind them.

        Raises:
            InputError: a number that is none, or below 0.
            SessionError: a step failed.
        """
        keep = as_integer("keep", keep, 0, InputError)
        ids = self.unread
        if len(ids) > keep:
            self._model.forward([ids[: len(ids) - keep]], self.state, logits="none")

    def write(self, **settings: Any) -> Iterator[int]:
        """Read what was added, and yield the tokens that the model writes behind it.

        Args:
            settings: see `LanguageModel.generate`.
        """
        for token in self._model.generate(self.unread, state=self.state, **settings):
            self._given = ([token], self.state.furthest)
            yield token

    def save(self, path: str | Path, *, labels: Mapping[str, str] | None = None) -> None:
        """Write state and unread tokens to a file, in one step.

        Args:
            path: of the file.
            labels: see `Snapshot`.

        Raises:
            InputError: the file cannot be written.
        """
        snapshot = self.state.snapshot()
        replace(snapshot, unread=tuple(self.unread), labels=labels or {}).save(path)

    def load(self, path: str | Path) -> None:
        """Go on where a stream of the same bundle was saved.

        Raises:
            InputError: there is no such file.
            SessionError: the file is damaged or of another bundle; this stream is as it was.
        """
        self.go_on(self.read_file(path))

    def read_file(self, path: str | Path) -> Snapshot:
        """Return what `save` wrote to a file; see `load`."""
        return Snapshot.load(path, self.state.contract, self.state.state_id, 1)

    def go_on(self, snapshot: Snapshot) -> None:
        """Stand where a stream of the same bundle stood.

        Raises:
            SessionError: it is of another bundle; this stream is as it was.
        """
        self.state.restore(snapshot)
        self.unread = snapshot.unread
