"""Children that take signals as a program in a terminal does, however the tests were started."""

from __future__ import annotations

import signal


def default_signals() -> None:
    """Undo what nohup or a background job of a shell leaves ignored; for `preexec_fn`."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
