"""The state that all endpoints of a server share, and the beginning of each answer."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from lminf_export.runtime.batching.stats import EngineStats
from lminf_export.serve.answering import Answering
from lminf_export.serve.api_errors import ApiError, invalid, shutting_down
from lminf_export.serve.caller import Caller
from lminf_export.serve.durable_sessions import open_durable_sessions
from lminf_export.serve.generation import Generation
from lminf_export.serve.kept_answer import AnswerKeeper, PrefixKeeper, SessionKeeper
from lminf_export.serve.metrics import ServerMetrics
from lminf_export.serve.planning import Plan
from lminf_export.serve.served_model import ServedModel
from lminf_export.serve.sessions import Lease, Sessions, session_key
from lminf_export.serve.settings import ServeSettings
from lminf_export.serve.shared_beginnings import SharedBeginning, SharedBeginnings
from lminf_export.serve.state_store import Conversation, StateStore

# Threads that tokenise and render; the engines' own are not among them.
_THREADS = 4

Planner = Callable[[Conversation | None], list[Plan]]


class Running:
    """A request that is being answered; closing it gives everything back.

    Attributes:
        answering: its sequences.
        headers: of the response: what was reused.
    """

    def __init__(self, serving: Serving, answering: Answering, lease: Lease | None) -> None:
        self.answering = answering
        self._serving = serving
        self._lease = lease
        self.headers = {"x-cached-tokens": str(answering.num_cached)}
        if lease is not None:
            self.headers["x-session-state"] = "resumed" if answering.is_follow_up else "new"
            self.headers["x-session-turn"] = str(lease.turn + 1)

    def release_session(self) -> None:
        """Let the next request of the session in, before the client knows of the end."""
        if self._lease is not None:
            self._lease.release()

    def close(self) -> None:
        """End what still runs."""
        self.answering.close()
        self.release_session()
        self._serving.running.discard(self)


class Serving:
    """Models, kept states, metrics, and whether the server ends.

    Args:
        models: by name.
        settings: limits.

    Raises:
        LminfError: the folder or the store of conversations cannot be used.

    Attributes:
        running: requests that are being answered.
        num_beginning: requests whose prompts are being read; their answers will run.
        num_requests: requests that are being read or answered.
        is_draining: whether new requests are refused.
    """

    def __init__(self, models: Mapping[str, ServedModel], settings: ServeSettings) -> None:
        self.models = dict(models)
        self.settings = settings
        prefix_bytes = settings.prefix_bytes
        if prefix_bytes is None:
            prefix_bytes = sum(model.engine.stats().cache_bytes for model in models.values())
        self.store = StateStore(
            settings.session_bytes, prefix_bytes if settings.prefix_reuse else 0
        )
        self.beginnings = SharedBeginnings()
        self.sessions = Sessions(settings, self.store, open_durable_sessions(settings))
        self.metrics = ServerMetrics(self.stats, self.sessions.counts)
        self.running: set[Running] = set()
        self.num_beginning = 0
        self.num_requests = 0
        self.is_draining = False
        self._threads = ThreadPoolExecutor(_THREADS, "lminf-serve")

    def stats(self) -> dict[str, EngineStats]:
        """Return each engine's counts."""
        return {name: model.engine.stats() for name, model in self.models.items()}

    def model(self, name: str | None) -> ServedModel:
        """Return a model; without a name the only one.

        Raises:
            ApiError: 404 for another name, 400 if none is given and several are served.
        """
        if name is None:
            if len(self.models) > 1:
                raise invalid(f"give a model: {', '.join(self.models)}", "model")
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r}; there are: {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    @property
    def is_answering(self) -> bool:
        """Whether an answer runs, or will."""
        return bool(self.running) or self.num_beginning > 0

    def require_open(self) -> None:
        """Refuse what comes while the server ends.

        Raises:
            ApiError: 503.
        """
        if self.is_draining:
            raise shutting_down()

    async def begin(
        self, caller: Caller, model: ServedModel, generation: Generation, planner: Planner
    ) -> Running:
        """Plan a request's prompts in a thread, and submit them.

        Raises:
            ApiError: the session is busy, a limit is exceeded, or the server ends.
            LminfError: see `Answering`.
        """
        self.require_open()
        self.num_beginning += 1
        try:
            running = await self._begun(caller, model, generation, planner)
            self.running.add(running)
        finally:
            self.num_beginning -= 1
        return running

    async def _begun(
        self, caller: Caller, model: ServedModel, generation: Generation, planner: Planner
    ) -> Running:
        lease = None
        if caller.session_id is not None:
            if generation.n > 1:
                raise invalid("a session goes on with one answer; n must be 1", "n")
            key = session_key(model.name, caller.owner, caller.session_id)
            lease = await self.sessions.lease(key, model.lm, begins=caller.begins)
        try:
            if lease is not None and caller.turn not in (None, lease.turn + 1):
                raise ApiError(
                    409,
                    f"this session stands at turn {lease.turn}, so turn {caller.turn} is no next "
                    "one; ask where it stands",
                    code="session_conflict",
                )
            if caller.must_exist and lease is not None and lease.conversation is None:
                raise ApiError(
                    404,
                    "this session is not kept: it never was, was deleted, or made room for "
                    "others; send the whole conversation",
                    code="session_not_found",
                )
            answering = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._submit, model, generation, planner, lease, caller
            )
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        return Running(self, answering, lease)

    def close(self) -> None:
        """End all engines, and write what is kept."""
        for model in self.models.values():
            model.engine.close()
        self._threads.shutdown()
        self.sessions.close()

    def _submit(
        self,
        model: ServedModel,
        generation: Generation,
        planner: Planner,
        lease: Lease | None,
        caller: Caller,
    ) -> Answering:
        plans = planner(lease.conversation if lease else None)
        limit = self.settings.max_prompt_tokens
        for plan in plans:
            if len(plan.ids) > limit:
                raise invalid(
                    f"the prompt has {len(plan.ids)} tokens; at most {limit} are read at once",
                    "prompt",
                    "context_length_exceeded",
                )
        scope = hashlib.sha256(f"{model.name}\n{caller.owner}".encode()).hexdigest()
        keepers: list[AnswerKeeper | None] = [None] * len(plans)
        if lease is not None:
            if len(plans) > 1:
                raise invalid("a session goes on with one prompt", "prompt")
            prefix = self._prefix(scope, plans[0], lease)
            keepers = [prefix if caller.ends else SessionKeeper(lease, plans[0], prefix)]
        elif self.settings.prefix_reuse and generation.n == 1:
            keepers = [PrefixKeeper(self.store, scope, plan.ids) for plan in plans]
        # What has been read before would not count for this penalty.
        if self.settings.prefix_reuse and generation.sampling.repetition_penalty == 1:
            chunk_size = model.lm.bundle.manifest.lambda_config.chunk_size
            plans = [self._behind_prefix(scope, plan, chunk_size) for plan in plans]
        settings = self.settings
        times = (settings.max_stream_seconds, settings.event_seconds)
        return Answering(model, generation, plans, keepers, self.metrics, *times)

    def _prefix(self, scope: str, plan: Plan, lease: Lease) -> PrefixKeeper | None:
        """Return what keeps a session's state for prompts without one, if it can."""
        read = None
        if plan.start is not None:
            read = lease.conversation.read if lease.conversation is not None else None
            if read is None:
                return None  # from the folder: its ids are not known
        if not self.settings.prefix_reuse:
            return None
        return PrefixKeeper(self.store, scope, plan.ids, read)

    def _behind_prefix(self, scope: str, plan: Plan, chunk_size: int) -> Plan:
        """Return the plan that goes on from the kept state which has read most of a prompt.

        Where other prompts begin with more of it, the state behind that is to be kept.
        """
        if plan.start is not None:
            return plan
        shared = self.beginnings.note(scope, plan.ids, chunk_size)
        snapshot = self.store.longest_prefix(scope, plan.ids)
        if snapshot is not None:
            plan = plan.behind(snapshot)
        # From a state that is no multiple of chunks a prompt is cut elsewhere.
        if shared is None or plan.num_cached % chunk_size:
            return plan
        count = shared.length // 4 - plan.num_cached
        if count <= 0:
            return plan
        return replace(plan, shared=SharedBeginning(self.store, scope, shared, count))
