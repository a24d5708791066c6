"""The measurements themselves: one loaded model, contestants in turns."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from lminf_export.bench.child import fresh_process
from lminf_export.bench.floor import (
    cache_bytes_per_step,
    device_bandwidth,
    gpu_bandwidth,
    streaming_bandwidth,
    weight_bytes_per_step,
)
from lminf_export.bench.outside import outside_run
from lminf_export.bench.profile import profile_decoding
from lminf_export.bench.report import BenchReport, Decode, Prefill
from lminf_export.bundle.folder import Bundle
from lminf_export.errors import InputError
from lminf_export.operator.settings import MAX_POSITION, as_integer
from lminf_export.progress import Progress, silent
from lminf_export.runtime.environment import environment
from lminf_export.runtime.kernels import AUTO
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load, names_plan
from lminf_export.runtime.options import Provider

WINDOWS = (1, 8, 64)
FAR = 1_000_000
_ROUNDS = 5
_WARM_UP = 2


@dataclass(frozen=True)
class BenchOptions:
    """Settings of a measurement.

    Attributes:
        batch_sizes: each is measured by itself.
        prefill_tokens: length of the prompt.
        decode_tokens: steps timed at each position.
        provider: onnxruntime's, "cpu" or "cuda".
        threads: of one operator; None leaves the choice to onnxruntime.
        kernels: what computes attention in onnxruntime: see `load`.
        profile: whether to profile decoding, too.

    Raises:
        InputError: a number below 1.
    """

    batch_sizes: tuple[int, ...] = (1, 4)
    prefill_tokens: int = 2048
    decode_tokens: int = 60
    provider: Provider = "cpu"
    threads: int | None = None
    kernels: str = AUTO
    profile: bool = False
    positions: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("prefill_tokens", "decode_tokens"):
            as_integer(name, getattr(self, name), 1, InputError)
        if not self.batch_sizes:
            raise InputError("batch_sizes: give at least one")
        for size in self.batch_sizes:
            as_integer("batch_size", size, 1, InputError)
        for position in self.positions:
            if as_integer("position", position, 1, InputError) > MAX_POSITION - 10**6:
                raise InputError(f"position {position}: must be well below 2**40")


def bench(
    bundle: str | Path, options: BenchOptions | None = None, progress: Progress = silent
) -> BenchReport:
    """Measure a bundle on this machine.

    Decoding positions are set, not read: rings are filled with random numbers and past_length
    is put where it is wanted, since what a step costs depends on neither values nor history.
    Positions take turns, a few steps at a time, so that all feel the same machine.

    Args:
        bundle: the bundle's folder or its graph, or its plan, which TensorRT runs on the GPU.
        options: what to measure.
        progress: called with the name of each measurement.

    Raises:
        BundleError: the bundle is damaged.
        InputError: an option makes no sense.
        SessionError: it does not run here, or its caches exceed this machine's memory.
    """
    options = options or BenchOptions()
    opened = Bundle.open(bundle)
    plan = names_plan(bundle, opened)
    if plan and options.profile:
        raise InputError("profile: is of onnxruntime's operators; a plan has none")
    named = opened.plan_path if plan and opened.plan_path is not None else opened.path
    progress("a fresh process", None)
    first_token, memory = fresh_process(named, options.provider, options.threads, options.kernels)
    model = load(named, provider=options.provider, threads=options.threads, kernels=options.kernels)
    progress("streaming memory", None)
    bandwidth = _bandwidth(model, options)
    prefill, decode = [], []
    for batch_size in options.batch_sizes:
        progress(f"prefill, batch {batch_size}", None)
        prefill.append(_prefill(model, batch_size, options.prefill_tokens))
        progress(f"decoding, batch {batch_size}", None)
        decode += _decode(model, batch_size, options, bandwidth)
    position = _positions(opened, options)[-1][1]
    steps = min(options.decode_tokens, 30)
    progress("outside the engine", None)
    outside = outside_run(model, position, steps)
    profile = None
    if options.profile:
        progress("profiling", None)
        profile = profile_decoding(
            opened, position, steps, options.provider, options.threads, options.kernels
        )
    manifest = opened.manifest
    return BenchReport(
        bundle=opened.path.resolve().name,
        model_type=manifest.model_type,
        dtype=manifest.dtype,
        quantization=manifest.quantization.description if manifest.quantization else None,
        kv_cache_dtype=manifest.kv_cache_dtype,
        window_size=manifest.settings.window_size,
        provider=manifest.engine.builder if plan and manifest.engine else options.provider,
        threads=options.threads,
        attention=model.session.attention,
        cuda_graph=model.session.cuda_graph if options.provider == "cuda" else None,
        cache_updates=model.session.cache_updates,
        bandwidth=bandwidth,
        positions_are_set=True,
        first_token=first_token,
        memory=memory,
        prefill=tuple(prefill),
        decode=tuple(decode),
        outside_run=outside,
        profile=profile,
        environment=environment(),
    )


def _bandwidth(model: LanguageModel, options: BenchOptions) -> float:
    """Bytes per second of the memory that the caches are in."""
    cuda = getattr(model.session, "cuda", None)
    if cuda is not None:
        return device_bandwidth(cuda)
    if options.provider == "cuda":
        return gpu_bandwidth()
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return streaming_bandwidth(options.threads or cores)


def _prefill(model: LanguageModel, batch_size: int, count: int) -> Prefill:
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (batch_size, count))
    warm = model.new_state(batch_size)
    model.forward(tokens[:, : min(count, 64)], warm, logits="last")
    del warm
    state = model.new_state(batch_size)
    start = time.perf_counter()
    model.forward(tokens, state, logits="last")
    seconds = time.perf_counter() - start
    return Prefill(batch_size, count, seconds, batch_size * count / seconds)


def _positions(bundle: Bundle, options: BenchOptions) -> list[tuple[int | None, int]]:
    """Return (windows, position): multiples of the window, then a far one; or those asked for."""
    if options.positions:
        return [(None, position) for position in options.positions]
    window = bundle.manifest.settings.window_size
    return [*((count, count * window) for count in WINDOWS), (None, FAR)]


def _decode(
    model: LanguageModel, batch_size: int, options: BenchOptions, bandwidth: float
) -> list[Decode]:
    bundle = model.bundle
    places = _positions(bundle, options)
    streams = [_Stream(model, batch_size, position) for _, position in places]
    steps = max(1, options.decode_tokens // _ROUNDS)
    for stream in streams:
        stream.steps(_WARM_UP)
    times: list[list[float]] = [[] for _ in streams]
    for _ in range(_ROUNDS):
        for stream, found in zip(streams, times, strict=True):
            found += stream.steps(steps)
    weights = weight_bytes_per_step(bundle, batch_size)
    rows = []
    for (windows, position), found in zip(places, times, strict=True):
        needed = weights + cache_bytes_per_step(bundle, position) * batch_size
        low, median, high = np.quantile(found, (0.25, 0.5, 0.75)).tolist()
        floor = needed / bandwidth
        rows.append(
            Decode(
                batch_size=batch_size,
                position=position,
                windows=windows,
                ms_per_step=median * 1e3,
                spread=(high - low) / 2 / median,
                bytes_per_step=needed,
                floor_ms=floor * 1e3,
                ratio_to_floor=median / floor,
            )
        )
    return rows


class _Stream:
    """A state that stands at one position, whatever it decodes."""

    def __init__(self, model: LanguageModel, batch_size: int, position: int) -> None:
        state = model.new_state(batch_size)
        self.model, self.state, self.position = model, state, position
        self.token: NDArray[np.int64] = np.zeros((batch_size, 1), np.int64)
        model.session.stand_at(state, position)
        model.session.fill(state, np.random.default_rng(1))

    def steps(self, count: int) -> list[float]:
        """Decode from the position; return the seconds of each step."""
        self.model.session.stand_at(self.state, self.position)
        found = []
        for _ in range(count):
            start = time.perf_counter()
            self.model.forward(self.token, self.state, logits="last")
            found.append(time.perf_counter() - start)
        return found
