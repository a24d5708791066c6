"""A text that comes line by line without end, and what a model writes into it."""

from __future__ import annotations

import codecs
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, get_args

from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.one_stream import OneStream
from lminf_export.runtime.text import StreamText

# Behind the words of a line; behind its newline, so that the next line is written; behind a blank
# line; behind all of it.
WriteAfter = Literal["line", "newline", "blank", "end"]
WRITE_AFTER = get_args(WriteAfter)

# Bytes of a line that are read as one; what is longer is cut there, wherever it comes from.
MOST_LINE_BYTES = 2**16
# Tokens that may wait to be read, and those that are kept as the context of what is written.
_MOST_UNREAD, _CONTEXT = 512, 32
_ENDS = {"line": "\n", "newline": "\n", "blank": "\n\n"}


class Following:
    """Reads lines into one state of bounded size and writes where it is told to.

    Each line is tokenised by itself, with its newline apart: what a stream yields depends on its
    text alone, and not on how it arrives. What the model writes is part of the stream.

    Args:
        model: the model.
        prompt: text before the first line.
        load: file of a stream to go on with, which stands before the prompt; None for none.
        write_after: where the model writes; it ends with a line, with "blank" at a blank line.

    Attributes:
        stream: what has been read and written.
        num_lines: lines read.
        num_written: tokens written.

    Raises:
        InputError: the file cannot be read.
        SessionError: it is damaged or of another bundle.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: str = "",
        write_after: WriteAfter = "line",
        *,
        load: str | Path | None = None,
    ) -> None:
        self.stream = OneStream(model)
        if load is not None:
            self.stream.load(load)
        self.num_lines = self.num_written = 0
        self._codec = model.codec
        self._write_after = write_after
        self._end = _ENDS.get(write_after, "")
        self._line_has_text = self._has_news = self._is_writing = False
        self._text: StreamText | None = None
        self._add(prompt)

    def answers(
        self, lines: IO[bytes], *, stop: Sequence[str] = (), **settings: Any
    ) -> Iterator[str]:
        """Read a stream to its end; yield what is written in pieces, newlines included.

        Bytes that are not UTF-8 become replacement characters.

        Args:
            lines: such as `sys.stdin.buffer`.
            stop: strings that end what is written; they are not yielded.
            settings: see `LanguageModel.generate`.

        Raises:
            ConfigError: a sampling setting outside its rule.
            SessionError: a step failed.
        """
        for text, ended in _pieces(lines):
            yield from self._line(text, ended, stop, settings)
        # The last line may have no newline; it is answered all the same.
        if self._line_has_text:
            self.num_lines += 1
            if self._write_after == "line":
                yield from self._finished(stop, settings)
        if self._has_news and self._write_after != "line":
            yield from self._finished(stop, settings)

    def _line(
        self, text: str, ended: bool, stop: Sequence[str], settings: dict[str, Any]
    ) -> Iterator[str]:
        """Read a line, or a piece of a long one, and write behind it if it is time."""
        self._add(text)
        self._line_has_text = self._line_has_text or bool(text)
        self._has_news = self._has_news or bool(text)
        if not ended:
            return
        self.num_lines += 1
        is_blank, self._line_has_text = not self._line_has_text, False
        if self._write_after == "line":
            if is_blank:
                self._add("\n")
                yield "\n"
            else:
                yield from self._finished(stop, settings)
            return
        self._add("\n")
        if self._write_after == "newline" or (
            self._write_after == "blank" and is_blank and self._has_news
        ):
            yield from self._finished(stop, settings)

    def _finished(self, stop: Sequence[str], settings: dict[str, Any]) -> Iterator[str]:
        """Write, and end it in the stream and in the text as it should."""
        self._is_writing = True
        ended = yield from self._written(stop, settings)
        yield self.end_writing(ended)

    def end_writing(self, ended: str | None = None) -> str:
        """End what is being written in the stream, also where its reader went in the middle.

        Args:
            ended: the stop string behind which it has ended by itself.

        Returns:
            The text that was held back for a stop string, and the end; "" if nothing is written.
        """
        if not self._is_writing:
            return ""
        held, self._text = self._text.finish() if self._text else "", None
        if not self._end or ended != self._end:
            self._add(self._end or "\n")
        self._has_news = self._line_has_text = self._is_writing = False
        return held + (self._end or "\n")

    def _written(
        self, stop: Sequence[str], settings: dict[str, Any]
    ) -> Generator[str, None, str | None]:
        """Yield what the model writes; return the stop string that ended it, or None."""
        ends = [self._end] if self._end else []
        text = self._text = StreamText(self._codec, self.stream.unread, (*ends, *stop))
        for token in self.stream.write(**settings):
            self.num_written += 1
            if piece := text.push(token):
                yield piece
            if text.found is not None:
                break
        return text.found

    def _add(self, text: str) -> None:
        if not text:
            return
        if self.stream.position:
            ids = self._codec.ids_behind(text, "\n")
        else:
            ids = self._codec.ids(text, add_special_tokens=True)
        self.stream.add(ids)
        if len(self.stream.unread) > _MOST_UNREAD:
            self.stream.read(keep=_CONTEXT)


def _pieces(lines: IO[bytes]) -> Iterator[tuple[str, bool]]:
    """Yield lines without their ends, long ones in pieces, and whether the line ends there."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    held = ""  # a carriage return at the end of a piece: perhaps the line's end comes next
    while raw := lines.readline(MOST_LINE_BYTES):
        ended = raw.endswith(b"\n")
        text = held + decoder.decode(raw, final=ended)
        held = "\r" if not ended and text.endswith("\r") else ""
        if ended:
            yield text.removesuffix("\n").removesuffix("\r"), True
        else:
            yield text.removesuffix(held), False
    if text := held + decoder.decode(b"", final=True):
        yield text, False
