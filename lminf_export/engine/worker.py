"""The child's side of `lminf_export.engine.child`: compile, answer."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import threading
from typing import IO, Any

from lminf_export.engine import tensorrt, tensorrt_rtx
from lminf_export.engine.child import DONE, ERROR, LOG, PROGRESS, Task
from lminf_export.engine.common import LOGGER_NAME, profiles
from lminf_export.engine.compiler import compile_plan
from lminf_export.errors import EngineError, LminfError

_BUILDERS = {module.NAME: module for module in (tensorrt, tensorrt_rtx)}


class _Replies:
    """Writes replies, from any thread, each as one line."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, *reply: Any) -> None:
        with self._lock:
            self._stream.write(json.dumps(reply) + "\n")
            self._stream.flush()

    def progress(self, phase: str, fraction: float | None) -> None:
        self.send(PROGRESS, phase, fraction)


class _LogReplies(logging.Handler):
    def __init__(self, replies: _Replies) -> None:
        super().__init__()
        self._replies = replies

    def emit(self, record: logging.LogRecord) -> None:
        self._replies.send(LOG, record.levelno, record.getMessage())


def main() -> None:
    """Do the one task that stdin holds."""
    replies = _Replies(_private_stdout())
    task = Task.from_json(sys.stdin.readline())
    answered = threading.Event()
    threading.Thread(target=_end_with_parent, args=(task, answered), daemon=True).start()
    logger = logging.getLogger(LOGGER_NAME)
    logger.addHandler(_LogReplies(replies))
    logger.setLevel(task.log_level)
    logger.propagate = False
    try:
        reply: tuple[Any, ...] = (DONE, _build(task, replies))
    except LminfError as error:
        reply = (ERROR, str(error))
    except OSError as error:
        name = task.request.plan_path
        reply = (ERROR, f"cannot write {name}: {error.strerror or error}")
    answered.set()
    replies.send(*reply)


def _build(task: Task, replies: _Replies) -> dict[str, Any]:
    builder = _BUILDERS[task.builder]
    try:
        trt = importlib.import_module(builder.PACKAGE)
    except (ImportError, OSError) as error:
        # A missing shared library is an OSError or an ImportError, by release.
        raise EngineError(
            f"the Python package {builder.PACKAGE} does not load: {error}; {builder.INSTALL}"
        ) from error
    config = compile_plan(trt, task.request, task.partial_path, replies.progress)
    return {
        "version": trt.__version__,
        "target": builder.target(trt, config),
        "profiles": profiles(task.request),
    }


def _private_stdout() -> IO[str]:
    """Keep stdout for replies, and send what libraries print there to stderr."""
    private = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return private


def _end_with_parent(task: Task, answered: threading.Event) -> None:
    """End this process when stdin ends, since a build may take hours that the parent left."""
    while sys.stdin.read(1):
        pass
    if answered.is_set():
        return
    task.partial_path.unlink(missing_ok=True)
    os._exit(1)


if __name__ == "__main__":
    main()
