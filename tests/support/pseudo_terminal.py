"""A program on a terminal of its own: keys go in, and what it shows is read as it comes."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence

from tests.support.signals import default_signals

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
_WHERE = b"\x1b[6n"


class PseudoTerminal:
    """A child on a terminal of 40 lines and 160 columns; ended with the context.

    Args:
        command: of the child.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))

        def adopt() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            default_signals()

        self.child = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm"},
            preexec_fn=adopt,
        )
        os.close(theirs)
        self.shown = ""

    def __enter__(self) -> PseudoTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.wait()
        self.close()

    def close(self) -> None:
        """Close the terminal, as its window would."""
        if self._ours >= 0:
            os.close(self._ours)
            self._ours = -1

    def keys(self, text: str) -> None:
        """Press keys."""
        os.write(self._ours, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Return what was shown up to a text, without escapes, and forget it."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            left = end - time.monotonic()
            if left <= 0 or not self._read(min(left, 1)):
                raise AssertionError(f"{text!r} was not shown, but {self.shown[-2000:]!r}")
        found, _, self.shown = self.shown.partition(text)
        return found

    def finish(self, seconds: float = 60) -> int:
        """Return the child's exit status when it has ended."""
        end = time.monotonic() + seconds
        while self._read(0.1) or self.child.poll() is None:
            assert time.monotonic() < end, f"it goes on: {self.shown[-2000:]!r}"
            time.sleep(0.01)
        return self.child.wait()

    def _read(self, seconds: float) -> bool:
        """Read what is there; return whether the child may show more."""
        if not select.select([self._ours], [], [], seconds)[0]:
            return self.child.poll() is None
        try:
            data = os.read(self._ours, 2**16)
        except OSError:  # the other side has gone
            return False
        # Somebody asks where the cursor is; a terminal answers.
        for _ in range(data.count(_WHERE)):
            self.keys("\x1b[1;1R")
        self.shown += _ESCAPES.sub("", data.decode(errors="replace"))
        return bool(data)
