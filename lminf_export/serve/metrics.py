"""Metrics for Prometheus: counts of engines, kept states, requests, and how long answers take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from lminf_export.runtime.batching.stats import EngineStats
from lminf_export.serve.state_store import StoreCounts

CONTENT_TYPE = CONTENT_TYPE_LATEST
_FIRST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BETWEEN_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_REQUESTS = ("lminf_requests", "Requests by endpoint and status.")
_FIRST = ("lminf_time_to_first_token_seconds", "From a request to its first token.")
_BETWEEN = ("lminf_inter_token_seconds", "From a token to the next, as a reader takes them.")
_CACHED = ("lminf_cached_tokens", "Tokens of prompts that a kept state had read.")
# Field of EngineStats → name, meaning.
_TOTALS = {
    "prompt_tokens": ("lminf_prompt_tokens", "Tokens read for prompts."),
    "new_tokens": ("lminf_new_tokens", "Tokens written."),
    "steps": ("lminf_decode_steps", "Steps of decoding, each a token of every active sequence."),
    "step_seconds": ("lminf_decode_step_seconds", "Time spent in steps of decoding."),
}
_LEVELS = {
    "slots": ("lminf_slots", "Sequences that can be active."),
    "active": ("lminf_slots_busy", "Sequences that have a slot."),
    "prefilling": ("lminf_slots_reading", "Sequences that read their prompt."),
    "waiting": ("lminf_queue_length", "Sequences that wait for a slot."),
    "parked": ("lminf_parked", "Sequences that gave their slot up for a while."),
    "cache_bytes": ("lminf_cache_bytes", "Bytes of the caches of all slots."),
    "parked_bytes": ("lminf_parked_bytes", "Bytes of the states of parked sequences."),
}
# Field of StoreCounts → name, meaning.
_KEPT = {
    "sessions": ("lminf_sessions", "Conversations kept in memory."),
    "prefixes": ("lminf_prefixes", "States kept for prompts that begin alike."),
    "nbytes": ("lminf_kept_bytes", "Bytes of kept states."),
    "files": ("lminf_sessions_on_disk", "Conversations in the folder."),
    "file_bytes": ("lminf_sessions_disk_bytes", "Bytes of the folder."),
}


def described() -> dict[str, str]:
    """Return the meaning of each metric, by the name that Prometheus sees."""
    counters = dict([_REQUESTS, _CACHED, *_TOTALS.values()])
    return {
        **{f"{name}_total": text for name, text in counters.items()},
        **dict([_FIRST, _BETWEEN, *_LEVELS.values(), *_KEPT.values()]),
    }


class ServerMetrics:
    """Metrics of one server, in a registry of their own.

    Labels are names of models and endpoints that exist, and statuses: no client can add any.

    Args:
        engines: returns the counts of each model's engine.
        kept: returns the counts of the kept states.
    """

    def __init__(
        self,
        engines: Callable[[], Mapping[str, EngineStats]],
        kept: Callable[[], StoreCounts],
    ) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(*_REQUESTS, ("endpoint", "status"), registry=self._registry)
        self._first = Histogram(
            *_FIRST, ("model",), buckets=_FIRST_BUCKETS, registry=self._registry
        )
        self._between = Histogram(
            *_BETWEEN, ("model",), buckets=_BETWEEN_BUCKETS, registry=self._registry
        )
        self._cached = Counter(*_CACHED, ("model",), registry=self._registry)
        self._registry.register(_Counts(engines, kept))

    def answered(self, endpoint: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(endpoint, str(status)).inc()

    def began(self, model: str, seconds: float) -> None:
        """Record the time to a first token."""
        self._first.labels(model).observe(seconds)

    def went_on(self, model: str, seconds: float, tokens: int) -> None:
        """Record tokens that came together, so long after the one before them."""
        between = self._between.labels(model)
        for _ in range(tokens):
            between.observe(seconds / tokens)

    def reused(self, model: str, tokens: int) -> None:
        """Count tokens that did not have to be read again."""
        self._cached.labels(model).inc(tokens)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Counts(Collector):
    """Counts that others keep, read when they are asked for."""

    def __init__(
        self,
        engines: Callable[[], Mapping[str, EngineStats]],
        kept: Callable[[], StoreCounts],
    ) -> None:
        self._engines = engines
        self._kept = kept

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics."""
        stats = self._engines()
        for field, (name, text) in _TOTALS.items():
            total = CounterMetricFamily(name, text, labels=("model",))
            for model, found in stats.items():
                total.add_metric((model,), getattr(found, field))
            yield total
        for field, (name, text) in _LEVELS.items():
            level = GaugeMetricFamily(name, text, labels=("model",))
            for model, found in stats.items():
                level.add_metric((model,), getattr(found, field))
            yield level
        counts = self._kept()
        for field, (name, text) in _KEPT.items():
            yield GaugeMetricFamily(name, text, getattr(counts, field))
