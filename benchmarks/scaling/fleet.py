"""A simulated fleet: sessions that come back, servers that fail and are replaced, and a store."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import simpy

from benchmarks.scaling.counts import Counts
from benchmarks.scaling.host import Host, Job
from benchmarks.scaling.ring import Ring
from benchmarks.scaling.settings import FleetSettings, Sizes, Times
from lminf_export.errors import ConfigError

_BATCH = 1 << 16
LOST = "conversations lost, but for their clients' copies"
# Servers that are tried for a turn where it may go to any.
_TRIED = 64


class Conversation:
    """A session that has come back at least once; others exist as a number only.

    Attributes:
        number: of it.
        version: turns answered since the beginning of the run.
        stored: the version that is durable.
        tokens: read so far.
        is_asking: whether a turn of it is on its way.
    """

    __slots__ = ("is_asking", "number", "stored", "tokens", "version")

    def __init__(self, number: int, tokens: int) -> None:
        self.number, self.tokens = number, tokens
        self.version = self.stored = 0
        self.is_asking = False


class Fleet:
    """Hosts behind a router, and everything that happens to them.

    Args:
        settings: of the run.
        times: of a server.
        sizes: of a session.

    Raises:
        ConfigError: servers have more slots than streams were measured side by side.

    Attributes:
        counts: of turns that arrived behind the warm-up.
        busy_slots: of all hosts, the mean behind the warm-up.
    """

    def __init__(self, settings: FleetSettings, times: Times, sizes: Sizes) -> None:
        if settings.slots > len(times.step):
            raise ConfigError(
                f"slots={settings.slots}: steps of {len(times.step)} streams at most were "
                "measured; take so many, or measure more (benchmarks.scaling.parameters --slots)"
            )
        self.settings, self.times, self.sizes = settings, times, sizes
        self.env = simpy.Environment()
        self.busy_slots = 0.0
        self.counts = Counts()
        self.ring = Ring(settings.hosts, settings.ring_points)
        self.hosts = [
            Host(
                self.env,
                number,
                times,
                settings.slots,
                settings.max_waiting,
                settings.session_bytes,
                self._written,
            )
            for number in range(settings.hosts)
        ]
        self._random = np.random.default_rng([settings.seed, 1])
        self._chances = np.random.default_rng([settings.seed, 2])
        self._random_hosts = np.random.default_rng([settings.seed, 4])
        self._conversations: dict[int, Conversation] = {}
        self._on_their_way = 0
        self._taking = settings.hosts
        self._end = settings.warm_up + settings.seconds
        weights = (
            np.arange(settings.sessions) + 1.0 + settings.zipf_shift
        ) ** -settings.zipf_exponent
        self._cumulative = np.cumsum(weights / weights.sum())
        # Old sessions have more history than this by what they read during the run.
        self._histories = np.random.default_rng([settings.seed, 3]).lognormal(
            np.log(settings.history_median), settings.history_sigma, settings.sessions
        )

    def run(self) -> Counts:
        """Simulate until every turn that arrived is over; return the counts."""
        self._fill_memories()
        self.env.process(self._arrivals())
        if self.settings.lifetime is not None:
            for host in self.hosts:
                self.env.process(self._failures(host))
        if self.settings.drain_share:
            self.env.process(self._replacements())
        if self.settings.warm_up:  # simpy refuses to run until now
            self.env.run(until=self.settings.warm_up)
        for host in self.hosts:
            host.settle()
            host.busy_seconds = 0.0
        self.env.run(until=self._end)
        for host in self.hosts:
            host.settle()
        self.busy_slots = sum(host.busy_seconds for host in self.hosts) / self.settings.seconds
        while self._on_their_way:
            self.env.step()
        return self.counts

    def _fill_memories(self) -> None:
        """Let each host keep the most active of the sessions that belong to it."""
        if self.settings.routing == "random":
            return
        room = {*range(self.settings.hosts)}
        for number in range(self.settings.sessions):
            home = self.ring.home(number)
            if home in room:
                nbytes = self._kept_bytes(int(self._histories[number]))
                if not self.hosts[home].keep(number, 0, nbytes, is_latest=False):
                    room.remove(home)
            if not room:
                return

    def _kept_bytes(self, tokens: int) -> int:
        """Return the bytes in memory of a session that has read so much."""
        bounded = self.settings.cache == "bounded"
        return self.sizes.kept if bounded else tokens * self.sizes.full_per_token

    def _stored_bytes(self, tokens: int) -> int:
        """Return the bytes in a store of a session that has read so much."""
        bounded = self.settings.cache == "bounded"
        return self.sizes.stored if bounded else tokens * self.sizes.full_per_token

    def _arrivals(self) -> Iterator[simpy.Event]:
        """Let turns arrive, at a constant rate and independent of each other."""
        settings, random = self.settings, self._random
        rate = settings.sessions * settings.answers_per_hour / 3600
        while True:
            numbers = np.searchsorted(self._cumulative, random.random(_BATCH)).tolist()
            gaps = random.exponential(1 / rate, _BATCH).tolist()
            prompts = random.geometric(1 / settings.prompt_tokens, _BATCH).tolist()
            answers = random.geometric(1 / settings.answer_tokens, _BATCH).tolist()
            for number, gap, prompt, answer in zip(numbers, gaps, prompts, answers, strict=True):
                yield self.env.timeout(gap)
                if self.env.now >= self._end:
                    return
                self._arrive(number, prompt, answer)

    def _arrive(self, number: int, prompt: int, answer: int) -> None:
        number = min(number, self.settings.sessions - 1)
        found = self._conversations.get(number)
        if found is None:
            found = Conversation(number, int(self._histories[number]) + 1)
            self._conversations[number] = found
        job = Job(found, self.env.now, prompt, answer)
        job.counts = self.env.now >= self.settings.warm_up
        self._count(job, "arrived")
        if found.is_asking:
            self._count(job, "refused, the session is being answered")
            return
        found.is_asking = True
        self._on_their_way += 1
        self._send(job)

    def _send(self, job: Job) -> None:
        """Choose a server, and let it have the session's state."""
        host = self._chosen(job.session.number)
        if host is None:
            self._give_up(job, "refused, no server takes it")
            return
        conversation = job.session
        job.tries += 1
        job.host = host
        host.jobs[job] = None
        kept = host.memory.get(conversation.number)
        nbytes = self._stored_bytes(conversation.tokens)
        # What copies take grows with the bytes; measured are those of a full-grown state.
        times = nbytes / self.sizes.stored
        has_store = self.settings.elsewhere == "store"
        wait = self.times.restore * times
        if has_store:  # is asked for the latest turn before a server trusts its own memory
            wait += self.settings.store_latency
        if kept is not None and kept[0] == conversation.version:
            job.source, job.read = "memory", job.prompt
        elif has_store:
            job.source, job.read = "store", job.prompt
            wait += self._transfer(nbytes) + self.times.load * times
            self._move(job, "read", nbytes)
        else:
            job.source, job.read = "reread", conversation.tokens + job.prompt
            wait = 0.0
            if job.counts:
                self.counts.events["tokens read again"] += conversation.tokens
        self.env.timeout(wait, (job, job.tries)).callbacks.append(self._resumed)

    def _chosen(self, session: int) -> Host | None:
        """Return the first host in a session's order that is not loaded beyond the bound."""
        settings = self.settings
        if settings.routing == "random":
            order = iter(self._random_hosts.integers(0, settings.hosts, _TRIED).tolist())
        else:
            order = self.ring.hosts(session)
        bound = max(settings.slots, settings.load_bound * self._on_their_way / max(self._taking, 1))
        for number in order:
            host = self.hosts[number]
            if host.takes and len(host.jobs) < bound:
                return host
        return None

    def _resumed(self, event: simpy.Event) -> None:
        job, attempt = event.value
        # Sent elsewhere meanwhile: its server has failed.
        if self._is_there(job, attempt) and not job.host.submit(job):
            self._give_up(job, "refused, the queue is full")

    def _written(self, job: Job) -> None:
        """Keep the state; an answer ends when it is durable."""
        nbytes = self._stored_bytes(job.session.tokens + job.prompt + job.answer)
        times = nbytes / self.sizes.stored
        wait = self.times.snapshot * times
        if self.settings.elsewhere == "store":
            wait += self._transfer(nbytes) + self.times.save * times
            self._move(job, "written", nbytes)
        self.env.timeout(wait, (job, job.tries)).callbacks.append(self._saved)

    def _saved(self, event: simpy.Event) -> None:
        job, attempt = event.value
        if not self._is_there(job, attempt):
            return
        conversation, host = job.session, job.host
        conversation.version += 1
        conversation.tokens += job.prompt + job.answer
        if self.settings.elsewhere == "store":
            conversation.stored = conversation.version
        nbytes = self._kept_bytes(conversation.tokens)
        host.keep(conversation.number, conversation.version, nbytes)
        del host.jobs[job]
        self._count(job, "answered")
        if job.counts:
            self.counts.first_token(job.source if job.tries == 1 else "asked again", job.first)
        self._over(job)

    @staticmethod
    def _is_there(job: Job, attempt: int) -> bool:
        """Tell whether a job is where it was when an event was planned."""
        return job.host is not None and job.tries == attempt and job in job.host.jobs

    def _give_up(self, job: Job, why: str) -> None:
        if job.host is not None:
            job.host.jobs.pop(job, None)
        self._count(job, why)
        self._over(job)

    def _over(self, job: Job) -> None:
        job.session.is_asking = False
        self._on_their_way -= 1

    def _failures(self, host: Host) -> Iterator[simpy.Event]:
        """Let a host fail from time to time, and come back empty."""
        settings = self.settings
        while True:
            yield self.env.timeout(self._chances.exponential(settings.lifetime))
            if not host.is_up or self.env.now >= self._end:
                continue
            self.counts.events["servers that failed"] += self.env.now >= settings.warm_up
            yield from self._down(host, settings.noticed, settings.recovery, "asked again, failure")

    def _replacements(self) -> Iterator[simpy.Event]:
        """Replace all hosts, group after group, each of which finishes its answers first."""
        settings = self.settings
        size = max(1, round(settings.drain_share * settings.hosts))
        yield self.env.timeout(settings.warm_up)
        for start in range(0, settings.hosts, size):
            group = [host for host in self.hosts[start : start + size] if host.is_up]
            for host in group:
                self._let(host, takes=False)
            until = self.env.now + settings.drain_grace
            while any(host.jobs for host in group) and self.env.now < until:
                yield self.env.timeout(1.0)
            ends = []
            for host in group:
                if host.is_up:
                    self.counts.events["servers that were replaced"] += 1
                    ends.append(
                        self.env.process(self._down(host, 0.0, 0.0, "asked again, replacement"))
                    )
            yield self.env.all_of(ends)

    def _down(self, host: Host, noticed: float, recovery: float, why: str) -> Iterator[simpy.Event]:
        """End a host's process: its turns are asked again, and what it kept is gone."""
        host.is_up = False
        self._let(host, takes=False)
        self._lose(host)
        lost = host.clear()
        for job in lost:
            self._count(job, why)
            job.host = None
        yield self.env.timeout(noticed)
        for job in lost:
            self._send(job)
        yield self.env.timeout(recovery + self.times.start)
        host.is_up = True
        self._let(host, takes=True)

    def _let(self, host: Host, *, takes: bool) -> None:
        """Send new turns to a host, or none."""
        self._taking += takes - host.takes
        host.takes = takes

    def _lose(self, host: Host) -> None:
        """Count the conversations that nobody has any more when a host's memory is gone."""
        if self.env.now < self.settings.warm_up:
            return
        for number, (version, _) in host.memory.items():
            found = self._conversations.get(number)
            if version != (0 if found is None else found.version):
                continue  # another server has answered since
            is_stored = found is None or found.stored == version
            is_safe = is_stored and self.settings.elsewhere == "store"
            self.counts.events["conversations in a store only" if is_safe else LOST] += 1

    def _transfer(self, nbytes: int) -> float:
        """Return the seconds in which a state comes from the store, or gets there."""
        return self.settings.store_latency + 8 * nbytes / self.settings.bandwidth

    def _move(self, job: Job, way: str, nbytes: int) -> None:
        if job.counts:
            self.counts.network_bytes[way] += nbytes

    def _count(self, job: Job, name: str) -> None:
        if job.counts:
            self.counts.events[name] += 1
