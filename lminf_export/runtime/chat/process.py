"""A chat template in a process of its own, whose time, memory and output are bounded."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from lminf_export.errors import BundleError, InputError, LminfError, SessionError, shortened

MOST_TEMPLATE_CHARACTERS = 2**20
MOST_TEXT_CHARACTERS = 2**24
MOST_SECONDS = 2.0
MOST_BYTES = 2**30
# Of a machine that does other things, too: processor time is what counts.
_MOST_WAITING = 60.0
_WORKER = Path(__file__).with_name("worker.py")
# What a Python needs to find its packages and the time; keys and passwords stay here.
_PASSED_ON = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")
_PIECE = 2**16


class TemplateProcess:
    """Renders one template; safe to use from several threads, which wait for each other.

    The process starts with the first rendering, anew after one that it did not survive, and ends
    with this object.

    Args:
        template: text of the template.
        name: of the template, for messages.

    Raises:
        BundleError: the template is too long.
    """

    def __init__(self, template: str, name: str) -> None:
        if len(template) > MOST_TEMPLATE_CHARACTERS:
            raise BundleError(
                f"{name} has {len(template)} characters, at most {MOST_TEMPLATE_CHARACTERS} are "
                "read; give another with --template FILE"
            )
        self._template, self._name = template, name
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize | None = None
        self._owner = 0

    def check(self) -> None:
        """Compile the template.

        Raises:
            BundleError: it is no template.
        """
        with self._lock:
            self._running()

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the text of the template.

        Raises:
            InputError: the template refuses what it is given, fails, or needs more than it may.
            BundleError: it is no template.
        """
        task = {
            "variables": dict(variables),
            "seconds": MOST_SECONDS,
            "characters": MOST_TEXT_CHARACTERS,
        }
        try:
            line = json.dumps(task)
        except (TypeError, ValueError, RecursionError) as error:
            reason = shortened(str(error), 80)
            raise InputError(f"a chat template takes values of JSON only: {reason}") from None
        with self._lock:
            reply = self._asked(self._running(), line, InputError)
        if "text" in reply:
            return str(reply["text"])
        reason = shortened(str(reply.get("refused") or reply.get("failed")), 160)
        if "refused" in reply:
            raise InputError(f"the chat template refuses these messages: {reason}")
        raise InputError(f"{self._name} fails: {reason}")

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the process, started and with the template compiled."""
        # A fork of the program that started it has the pipes, but they are not its own.
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        if not sys.executable:
            raise SessionError("a chat template is rendered by a second Python, and none is found")
        # A terminal's Ctrl-C is for this program alone, hence the session.
        child = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            start_new_session=True,
            bufsize=0,
        )
        if self._end is not None and self._owner == os.getpid():
            self._end()
        self._child, self._owner = child, os.getpid()
        self._end = weakref.finalize(self, _close, child, self._owner)
        task = {"template": self._template, "memory": MOST_BYTES, "seconds": MOST_SECONDS}
        reply = self._asked(child, json.dumps(task), BundleError)
        if "ready" not in reply:
            self._end()
            reason = shortened(str(reply.get("failed")), 160)
            raise BundleError(f"{self._name} is no chat template: {reason}")
        return child

    def _asked(
        self, child: subprocess.Popen[bytes], line: str, kind: type[LminfError]
    ) -> dict[str, Any]:
        """Send a line and return the reply; a process that gives none is ended."""
        assert self._end is not None
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            reply = _reply(child.stdin, child.stdout, line.encode("ascii") + b"\n")
        except TimeoutError:
            self._end()
            raise kind(
                f"{self._name} took more than {_MOST_WAITING:g} s; give another with "
                "--template FILE"
            ) from None
        except BaseException:  # an interrupt: what comes next would be read as another's reply
            self._end()
            raise
        if reply is not None:
            return reply
        self._end()
        raise kind(f"{self._name} {_ending(child.returncode)}; give another with --template FILE")


def _reply(writing: IO[bytes], reading: IO[bytes], line: bytes) -> dict[str, Any] | None:
    """Write a line and read one; None if the other side has ended.

    Raises:
        TimeoutError: it takes too long.
    """
    end = time.monotonic() + _MOST_WAITING
    os.set_blocking(writing.fileno(), False)
    # Both at once: a process that has ended reads no more, and one that replies may not, either.
    left, found = memoryview(line), bytearray()
    while not found.endswith(b"\n"):
        seconds = end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        readable, writable, _ = select.select(
            [reading], [writing] if left else [], [], min(seconds, 1.0)
        )
        try:
            if writable:
                left = left[os.write(writing.fileno(), left[:_PIECE]) :]
        except BrokenPipeError:
            return None
        if readable:
            piece = os.read(reading.fileno(), _PIECE)
            if not piece:
                return None
            found += piece
    reply = json.loads(found)
    return reply if isinstance(reply, dict) else None


def _ending(code: int | None) -> str:
    if code == -signal.SIGPROF:
        return f"took more than {MOST_SECONDS:g} s of processor time"
    if code in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT):
        return f"ended its process (signal {-code}), for want of memory or of a limit"
    return f"ended its process with {code}"


def _close(child: subprocess.Popen[bytes], owner: int) -> None:
    """End a process; only the program that started it may."""
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    if owner != os.getpid():
        return
    try:
        child.wait(0.2)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
