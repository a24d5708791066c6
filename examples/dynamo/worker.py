"""Serves a bundle behind NVIDIA Dynamo's frontend.

    python examples/dynamo/worker.py BUNDLE [--name NAME] [--slots 8] …

Dynamo's frontend reads HTTP, templates and tokenizers, and sends token ids; this worker puts them
into an engine's slots and sends tokens back. README.md says how to start both.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, NoReturn

from dynamo._core import Context
from dynamo.common.backend import (
    EngineConfig,
    GenerateChunk,
    GenerateRequest,
    LLMEngine,
    LlmRegistration,
    WorkerConfig,
)
from dynamo.common.backend.run import run
from dynamo.llm.exceptions import EngineShutdown, HttpError, InvalidArgument, Unknown
from model_folder import model_folder
from translation import Limits, chunks, engine_request

import lminf_export
from lminf_export import Engine
from lminf_export.errors import BusyError, ConfigError, InputError, LminfError
from lminf_export.operator.settings import as_integer
from lminf_export.runtime.batching.stream import TokenStream

# Dynamo opens these on all interfaces where nothing is said.
HOSTS = (
    "DYN_TCP_RPC_HOST",
    "DYN_TCP_RESPONSE_STREAM_HOST",
    "DYN_EVENT_PLANE_HOST",
    "DYN_SYSTEM_HOST",
)
# Workers whose folders have other paths are no replicas to Dynamo, so it is none of a process.
FOLDERS = Path("~/.cache/lminf_export/dynamo").expanduser()


class LminfEngine(LLMEngine):
    """Dynamo's engine interface over the slots of one bundle.

    Args:
        engine: of the bundle, with its slots.
        options: of the command line; see `parser`.
    """

    def __init__(self, engine: Engine, options: argparse.Namespace) -> None:
        self.engine, self.options = engine, options
        self._running: dict[str, TokenStream] = {}
        self._limits = Limits(options.default_max_tokens, options.context_length)
        self._eos = frozenset(engine.lm.bundle.manifest.eos_token_ids)
        # Read by the frontend, or sent to it where DYN_SYSTEM_PORT is set.
        self.folder = str(model_folder(engine.lm.bundle, options.model_folders.absolute()))

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[LminfEngine, WorkerConfig]:
        """Load the bundle; return it with its slots, and how the worker joins Dynamo.

        Raises:
            LminfError: the bundle cannot be loaded or has no tokenizer, or an option is wrong.
        """
        options = checked(parser().parse_args(argv))
        lm = lminf_export.load(options.bundle)
        slots = Engine(lm, slots=options.slots, max_waiting=options.max_waiting)
        engine = cls(slots, options)
        config = WorkerConfig(
            namespace=options.namespace,
            component="lminf",
            model_name=engine.folder,
            served_model_name=engine.name,
            discovery_backend=options.discovery_backend,
            request_plane="tcp",
            event_plane="zmq",
            # A state has no blocks that a router could choose by.
            enable_kv_routing=False,
            enable_local_indexer=False,
        )
        return engine, config

    @property
    def name(self) -> str:
        """The model's, as requests have it."""
        return str(self.options.name or Path(self.options.bundle).resolve().name)

    async def start(self, worker_id: int) -> EngineConfig:
        """Return what the frontend is told of the model; the slots are there already."""
        options = self.options
        limits = LlmRegistration(context_length=options.context_length, max_num_seqs=options.slots)
        return EngineConfig(model=self.folder, served_model_name=self.name, llm=limits)

    async def generate(
        self, request: GenerateRequest, context: Context
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Give the chunks of one request."""
        try:
            stream = self.engine.submit(engine_request(request, self._eos, self._limits))
        except (InputError, ConfigError) as error:
            raise InvalidArgument(str(error)) from error
        except BusyError as error:
            raise HttpError(429, str(error)) from error
        except LminfError as error:
            # It makes the frontend forget this worker: the engine has ended.
            raise EngineShutdown(str(error)) from error
        self._running[context.id()] = stream
        try:
            async for chunk in chunks(stream, self._text_of):
                yield chunk
        except LminfError as error:
            raise Unknown(str(error)) from error
        finally:
            self._running.pop(context.id(), None)
            stream.cancel()

    async def abort(self, context: Context) -> None:
        """Give the slot of a request back whose client has gone."""
        stream = self._running.get(context.id())
        if stream is not None:
            stream.cancel()

    async def register_prometheus(self, metrics: Any) -> None:
        """Show the engine's counts at `/metrics` of the port DYN_SYSTEM_PORT."""
        metrics.register_prometheus_expfmt_callback(self._counts)

    def _counts(self) -> str:
        stats = self.engine.stats()
        counts = {
            "lminf_slots": stats.slots,
            "lminf_slots_busy": stats.active,
            "lminf_queue_length": stats.waiting,
            "lminf_cache_bytes": stats.cache_bytes,
        }
        gauges = [f"# TYPE {name} gauge\n{name} {count}\n" for name, count in counts.items()]
        total = "lminf_new_tokens_total"
        return "".join(gauges) + f"# TYPE {total} counter\n{total} {stats.new_tokens}\n"

    def _text_of(self, token_id: int) -> str:
        tokenizer = self.engine.lm.codec.tokenizer
        return str(tokenizer.decode([token_id], skip_special_tokens=False))

    async def cleanup(self) -> None:
        """Let what still runs finish, for a while, and end the engine."""
        end = time.monotonic() + self.options.shutdown_seconds
        await asyncio.to_thread(self.engine.drain, self.options.shutdown_seconds)
        self.engine.close()
        # What an ended request wrote is sent before Dynamo closes the connections.
        while self._running and time.monotonic() < end + 1:
            await asyncio.sleep(0.01)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of `lminf` are; --help has the options."""

    def error(self, message: str) -> NoReturn:
        """Print the line, and exit with 2."""
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """Return the worker's options."""
    found = OneLineParser(description=(__doc__ or "").partition("\n")[0])
    option = found.add_argument
    option("bundle", type=Path, help="folder that lminf-export wrote")
    option("--name", help="of the model; default: the folder's")
    option("--slots", type=int, default=8, help="sequences written side by side")
    option("--max-waiting", type=int, default=256, help="sequences that may wait for a slot")
    option("--default-max-tokens", type=int, default=256, help="if a request names no number")
    option("--context-length", type=int, default=393_216, help="tokens of prompt and answer")
    option("--shutdown-seconds", type=float, default=30, help="for running answers after SIGTERM")
    option(
        "--model-folders", type=Path, default=FOLDERS, help="where the frontend reads tokenizers"
    )
    option("--namespace", default="dynamo", help="of the workers that a frontend looks for")
    backends = ("file", "etcd", "kubernetes")
    option("--discovery-backend", default="file", choices=backends, help="as the frontend's")
    return found


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """Return options that no other code checks.

    Raises:
        InputError: a number is outside its rule.
    """
    as_integer("--default-max-tokens", options.default_max_tokens, 1, InputError)
    as_integer("--context-length", options.context_length, 2, InputError)
    if not 0 <= options.shutdown_seconds < threading.TIMEOUT_MAX:
        raise InputError(
            f"--shutdown-seconds {options.shutdown_seconds}: must be a finite number, at least 0"
        )
    return options


def main() -> None:
    """Run the worker until it is told to end."""
    for name in HOSTS:
        os.environ.setdefault(name, "127.0.0.1")
    try:
        run(LminfEngine)
    except LminfError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
