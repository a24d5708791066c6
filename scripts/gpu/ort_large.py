"""Stages of onnxruntime_gpu over models of full size: speed, memory, and transformers beside it.

Weights are random. Decoding positions are set, not read: what a step costs depends on neither
values nor history, and the caches hold random numbers.
"""

from __future__ import annotations

import gc
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from scripts.gpu.onnxruntime_gpu import Run, SkipStage
from scripts.gpu.ort_machine import copy_bandwidth
from scripts.gpu.ort_memory import device_bytes, fill_caches, free_bytes, model_bytes

WINDOW, SINKS, CHUNK = 4096, 10, 1024  # window and sinks of the paper
POSITIONS = (1024, 4096 + SINKS, 8192, 32768, 131072, 1_000_000)
CONTEXT = 32768
BATCH_SIZES = (1, 8, 32, 64)
_ROUNDS, _STEPS, _WARM_UP = 6, 12, 3
# Positions behind the first window: their medians may differ by this much.
FLAT = 0.01
_SPARE_BYTES = 6 * 2**30  # for weights' staging and workspaces beside a batch's caches


def _shape(run: Run, model: str) -> dict[str, Any]:
    from benchmarks.support.checkpoints import SHAPES

    if run.on_gpu and not run.quick:
        return SHAPES[model]
    small = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4 if model == "llama-2-7b" else 1}
    return {"vocab_size": 2048, **small, **heads}


def _settings(run: Run) -> dict[str, Any]:
    if run.on_gpu:
        return {"window_size": WINDOW, "num_sink_tokens": SINKS, "chunk_size": CHUNK}
    return {"window_size": 128, "num_sink_tokens": SINKS, "chunk_size": 64}


def bundle_8b(run: Run) -> list[str]:
    """Write and export a Llama-3-8B of random weights."""
    return _bundle(run, "llama-3-8b")


def bundle_7b(run: Run) -> list[str]:
    """Write and export a Llama-2-7B of random weights."""
    return _bundle(run, "llama-2-7b")


def decode_8b(run: Run) -> list[str]:
    """Time decoding of the Llama-3-8B."""
    return _decode(run, "llama-3-8b")


def decode_7b(run: Run) -> list[str]:
    """Time decoding of the Llama-2-7B."""
    return _decode(run, "llama-2-7b")


def peers_8b(run: Run) -> list[str]:
    """Time transformers with the weights of the Llama-3-8B, and ours, behind 32k tokens."""
    return _peers(run, "llama-3-8b")


def peers_7b(run: Run) -> list[str]:
    """Time transformers with the weights of the Llama-2-7B, and ours, behind 32k tokens."""
    return _peers(run, "llama-2-7b")


def _bundle(run: Run, model: str) -> list[str]:
    import torch

    import lminf_export
    from benchmarks.support.checkpoints import write_checkpoint

    source, bundle = _folders(run, model)
    dtype = torch.float16 if run.on_gpu else torch.float32
    start = time.perf_counter()
    parameters = None
    if not (source / "model.safetensors.index.json").is_file():
        parameters = write_checkpoint(source, _shape(run, model), dtype, 2**20)
    run.note(parameters=parameters, write_seconds=round(time.perf_counter() - start, 2))
    start = time.perf_counter()
    lminf_export.export(
        source,
        bundle,
        dtype=str(dtype).removeprefix("torch."),
        weights="link",
        # Running a model of this size on the CPU takes minutes; the stage kernels checks graphs.
        check=False,
        force=True,
        **_settings(run),
    )
    run.note(export_seconds=round(time.perf_counter() - start, 2))
    return []


def _folders(run: Run, model: str) -> tuple[Path, Path]:
    return run.work / model, run.work / "bundles" / model


def _load(run: Run, model: str, **settings: Any) -> Any:
    from lminf_export import load

    bundle = _folders(run, model)[1]
    if not (bundle / "lminf.json").is_file():
        raise SkipStage(f"there is no bundle of {model}: run its stage bundle first")
    return load(bundle, provider=run.provider, **settings)


def _decode(run: Run, model: str) -> list[str]:
    before = device_bytes(run)
    start = time.perf_counter()
    loaded = _load(run, model)
    run.note(
        load_seconds=round(time.perf_counter() - start, 2),
        attention=loaded.session.attention,
        cuda_graph=loaded.session.cuda_graph,
        weights_on_device=device_bytes(run) - before,
        copy_bytes_per_second=copy_bandwidth() if run.on_gpu else None,
    )
    problems = []
    rows = _positions(run, loaded)
    run.note(positions=rows)
    flat = [row["ms_per_token"] for row in rows if row["position"] > _settings(run)["window_size"]]
    apart = (max(flat) - min(flat)) / statistics.median(flat)
    run.note(flat_within=apart)
    if run.on_gpu and not run.quick and apart > 2 * FLAT:
        problems.append(f"decoding is not flat behind the window: {apart:.1%} apart")
    if run.on_gpu and loaded.session.cuda_graph != "yes":
        problems.append(f"CUDA graph: {loaded.session.cuda_graph}")
    run.note(batches=_batches(run, loaded))
    run.note(prefill=_prefill(run, loaded))
    del loaded
    gc.collect()
    others: dict[str, dict[str, Any]] = {
        "no CUDA graph": {"cuda_graphs": False},
        "function body": {"kernels": "none"},
    }
    for name, settings in others.items():
        other = _load(run, model, **settings)
        run.note(**{name: _timed(run, other, [_stream(run, other, 1, CONTEXT)])[0]})
        del other
        gc.collect()
    return problems


class _Stream:
    """A state that stands at one position."""

    def __init__(self, model: Any, state: Any, position: int) -> None:
        self.model, self.state, self.position = model, state, position
        self.token = np.zeros((state.batch_size, 1), np.int64)

    def steps(self, count: int) -> list[float]:
        """Decode from the position; return the seconds of each step, as a caller feels them."""
        self.model.session.stand_at(self.state, self.position)
        found = []
        for _ in range(count):
            start = time.perf_counter()
            self.model.forward(self.token, self.state, logits="last")
            found.append(time.perf_counter() - start)
        return found


def _stream(run: Run, model: Any, batch_size: int, position: int) -> _Stream:
    state = model.new_state(batch_size)
    fill_caches(run, model, state)
    return _Stream(model, state, position)


def _positions(run: Run, model: Any) -> list[dict[str, Any]]:
    """Time one state at every position in turns: the same caches and the same graph."""
    state = model.new_state(1)
    fill_caches(run, model, state)
    return _timed(run, model, [_Stream(model, state, position) for position in POSITIONS])


def _timed(run: Run, model: Any, streams: list[_Stream]) -> list[dict[str, Any]]:
    from lminf_export.bench.floor import cache_bytes_per_step, weight_bytes_per_step

    steps = _STEPS if run.on_gpu else 2
    times: list[list[float]] = [[] for _ in streams]
    for stream in streams:
        stream.steps(_WARM_UP)
    for _ in range(_ROUNDS if run.on_gpu else 2):
        for stream, found in zip(streams, times, strict=True):
            found += stream.steps(steps)
    bandwidth = run.found.get("copy_bytes_per_second")
    rows = []
    for stream, found in zip(streams, times, strict=True):
        batch_size = stream.state.batch_size
        needed = weight_bytes_per_step(model.bundle, batch_size)
        needed += cache_bytes_per_step(model.bundle, stream.position) * batch_size
        low, median, high = np.quantile(found, (0.25, 0.5, 0.75)).tolist()
        rows.append(
            {
                "position": stream.position,
                "batch_size": batch_size,
                "ms_per_token": median * 1e3,
                "quartiles_ms": [low * 1e3, high * 1e3],
                "tokens_per_second": batch_size / median,
                "bytes_needed": needed,
                "bytes_per_second": needed / median,
                "of_copy_bandwidth": needed / median / bandwidth if bandwidth else None,
            }
        )
    return rows


def _batches(run: Run, model: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    each = model.bundle.manifest.contract.cache_bytes()
    for batch_size in BATCH_SIZES if run.on_gpu else (1, 3):
        if run.on_gpu and batch_size * each > free_bytes() - _SPARE_BYTES:
            rows.append(
                {"batch_size": batch_size, "left_out": f"caches take {batch_size * each} bytes"}
            )
            continue
        before = device_bytes(run)
        stream = _stream(run, model, batch_size, CONTEXT)
        (row,) = _timed(run, model, [stream])
        row["device_bytes_of_the_state"] = device_bytes(run) - before
        rows.append(row)
        run.note(batches=rows)
        del stream
        gc.collect()
    return rows


def _prefill(run: Run, model: Any) -> dict[str, Any]:
    count = CONTEXT if run.on_gpu and not run.quick else 512
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, count))
    model.forward(tokens[:, : min(count, 2 * CHUNK)], model.new_state(), logits="last")
    state = model.new_state()
    start = time.perf_counter()
    model.forward(tokens, state, logits="last")
    seconds = time.perf_counter() - start
    return {"tokens": count, "seconds": seconds, "tokens_per_second": count / seconds}


def _peers(run: Run, model: str) -> list[str]:
    """The paper's experiment: encode 32k tokens, decode behind them."""
    from scripts.gpu.ort_peers import CONTESTANTS, run_contestant

    source, _ = _folders(run, model)
    if not (source / "config.json").is_file():
        raise SkipStage(f"there are no weights of {model}: run its stage bundle first")
    context = CONTEXT if run.on_gpu and not run.quick else 512
    rows: dict[str, Any] = {}
    for name in CONTESTANTS:
        rows[name] = run_contestant(run, name, source, context)
        run.note(contestants=rows)
    before = device_bytes(run)
    loaded = _load(run, model)
    ours: dict[str, Any] = {"weights_bytes": model_bytes(source)}
    ours |= _prefill_and_decode(run, loaded, context)
    ours["peak_device_bytes"] = device_bytes(run) - before
    rows["ours"] = ours
    run.note(contestants=rows)
    faster = {
        name: row["ms_per_token"] / ours["ms_per_token"]
        for name, row in rows.items()
        if "ms_per_token" in row and name != "ours"
    }
    run.note(decode_times_faster_than=faster)
    return [f"{name}: {row['failed']}" for name, row in rows.items() if "failed" in row]


def _prefill_and_decode(run: Run, model: Any, context: int) -> dict[str, Any]:
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, context))
    model.forward(tokens[:, :64], model.new_state(), logits="last")
    state = model.new_state()
    start = time.perf_counter()
    model.forward(tokens, state, logits="last")
    encoded = time.perf_counter() - start
    times = []
    for _ in range(_WARM_UP + (60 if run.on_gpu else 5)):
        start = time.perf_counter()
        model.forward([[7]], state, logits="last")
        times.append(time.perf_counter() - start)
    return {
        "encode_seconds": encoded,
        "ms_per_token": statistics.median(times[_WARM_UP:]) * 1e3,
        "cuda_graph": model.session.cuda_graph,
    }
