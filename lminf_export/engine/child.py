"""Build in a child process: a crash becomes an error, and its memory is released when it ends.

Protocol: the parent writes one JSON object to the child's stdin and keeps it open; the child
writes replies, JSON lists of a kind and its values, one a line, to its stdout. When stdin ends,
the parent has ended, and the child ends too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import lminf_export
from lminf_export.engine.common import LOGGER_NAME, EngineFacts, EngineRequest
from lminf_export.engine.options import EngineOptions
from lminf_export.errors import EngineError
from lminf_export.operator.bindings import LayerSpec
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.progress import Progress, silent

logger = logging.getLogger(LOGGER_NAME)

WORKER = (sys.executable, "-m", "lminf_export.engine.worker")
# Kinds of reply: ["progress", phase, fraction], ["log", level, text], ["error", text],
# ["done", facts of the builder].
PROGRESS, LOG, ERROR, DONE = "progress", "log", "error", "done"

_LAST_WORDS = 200


@dataclass(frozen=True)
class Task:
    """The child's task, sent as one line of JSON.

    Attributes:
        builder: "tensorrt" or "tensorrt-rtx".
        request: what to build.
        partial_path: scratch file for the plan, beside its destination.
        log_level: the lowest level that the parent logs.
    """

    builder: str
    request: EngineRequest
    partial_path: Path
    log_level: int

    def to_json(self) -> str:
        """Return the task as one line."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Read what `to_json` wrote."""
        raw = json.loads(text)
        request = raw["request"]
        contract = request["contract"]
        layers = tuple(LayerSpec(**layer) for layer in contract.pop("layers"))
        return cls(
            builder=raw["builder"],
            request=EngineRequest(
                onnx_path=Path(request["onnx_path"]),
                plan_path=Path(request["plan_path"]),
                contract=GraphContract(layers, **contract),
                chunk_size=request["chunk_size"],
                max_batch_size=request["max_batch_size"],
                with_plugin=request["with_plugin"],
                plugin_path=Path(request["plugin_path"]) if request["plugin_path"] else None,
                options=EngineOptions(**request["options"]),
            ),
            partial_path=Path(raw["partial_path"]),
            log_level=raw["log_level"],
        )


def build_in_child(
    builder: str,
    request: EngineRequest,
    progress: Progress = silent,
    *,
    command: Sequence[str] = WORKER,
) -> EngineFacts:
    """Build a plan in a child process; it appears under its name only when it is whole.

    Args:
        builder: "tensorrt" or "tensorrt-rtx".
        request: what to build.
        progress: receives the phase that runs.
        command: the child's command line; tests pass one that crashes.

    Raises:
        EngineError: with the builder's reason, or how the child ended.
    """
    begun = time.monotonic()
    mark = f"{os.getpid()}.{time.monotonic_ns()}"
    task = Task(
        builder=builder,
        request=request,
        partial_path=request.plan_path.with_name(f".{request.plan_path.name}.{mark}.partial"),
        log_level=logger.getEffectiveLevel(),
    )
    try:
        facts = _run(command, task, progress)
        size = task.partial_path.stat().st_size
        os.replace(task.partial_path, request.plan_path)
    except OSError as error:
        raise EngineError(f"cannot build {request.plan_path}: {error.strerror}") from error
    finally:
        task.partial_path.unlink(missing_ok=True)
    facts["profiles"] = tuple(
        {symbol: tuple(sizes) for symbol, sizes in profile.items()} for profile in facts["profiles"]
    )
    return EngineFacts(
        builder=builder,
        dtype=request.contract.dtype,
        cache_updates=len(request.updated_in_place),
        seconds=time.monotonic() - begun,
        bytes=size,
        **facts,
    )


def _run(command: Sequence[str], task: Task, progress: Progress) -> dict[str, Any]:
    """Run the child to its end; return its facts about the plan."""
    with tempfile.TemporaryFile() as stderr:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=_environment(),
            text=True,
            encoding="utf-8",
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            _tell(child.stdin, task)
            facts = _listen(child.stdout, progress)
        finally:
            if sys.exc_info()[0] is not None:
                child.kill()
            # The child ends when its stdin is closed.
            _close(child.stdin)
            status = child.wait()
            child.stdout.close()
        words = _last_words(stderr)
    if facts is None:
        raise EngineError(
            f"the {task.builder} builder {_ending(status)}"
            + (f"; its last words: {words}" if words else "")
            + "; -v shows its messages"
        )
    return facts


def _tell(stdin: IO[str], task: Task) -> None:
    # A broken pipe means that the child has ended; its exit status says how.
    with contextlib.suppress(BrokenPipeError):
        stdin.write(task.to_json() + "\n")
        stdin.flush()


def _close(stdin: IO[str]) -> None:
    with contextlib.suppress(BrokenPipeError):
        stdin.close()


def _listen(stdout: IO[str], progress: Progress) -> dict[str, Any] | None:
    """Forward the child's replies until it is done or has ended."""
    for line in stdout:
        kind, *rest = json.loads(line)
        if kind == PROGRESS:
            progress(rest[0], rest[1])
        elif kind == LOG:
            logger.log(rest[0], "%s", rest[1])
        elif kind == ERROR:
            raise EngineError(rest[0])
        elif kind == DONE:
            return rest[0]
    return None


def _environment() -> dict[str, str]:
    """The child must find this package where this process found it."""
    root = str(Path(next(iter(lminf_export.__path__))).parent)
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *([before] if before else [])])}


def _last_words(stderr: IO[bytes]) -> str:
    stderr.seek(0)
    text = stderr.read().decode(errors="replace").strip()
    if text:
        logger.info("the builder's stderr: %s", text)
    return text.splitlines()[-1][:_LAST_WORDS] if text else ""


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status} before the plan was done"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    # SIGKILL usually comes from the kernel's out-of-memory killer.
    hint = " (perhaps this machine has too little memory)" if name == "SIGKILL" else ""
    return f"crashed: {name}{hint}"
