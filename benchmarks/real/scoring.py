"""Reads a long text with one method, and notes the likelihood of a sample of its tokens.

With a vocabulary of a quarter million the logits cost more than the layers, so that only each
fourth token is scored, and from DENSE tokens on each sixteenth. A chunk gives one number, the mean
of its scored tokens: results hold them all, so that any two methods can be compared on the same
tokens later. Tokens at multiples of SINGLE are noted one by one, too, for methods that are too slow
to read everything.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lminf_export.evaluate.torch_scorers import CachedScorer, TorchModel
from lminf_export.models.base import Step
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.verify.likelihood import negative_log_likelihood

CHUNK = 256
EVERY, SPARSE = 4, 16
# Tokens up to which each fourth is scored; an edge of the buckets of `readings.buckets`.
DENSE = 32_768
SINGLE = 1024
SAVE_SECONDS = 60.0
# Caches as large as this are written as often as that, larger ones less often.
SAVE_BYTES = 2**26


class Reader(Protocol):
    """Reads a stream chunk by chunk."""

    @property
    def nbytes(self) -> int:
        """Bytes of its cache."""
        ...

    def read(self, ids: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read tokens (S,) and return the logits (K, V) behind those at rows (K,)."""
        ...

    def snapshot(self) -> Mapping[str, np.ndarray] | None:
        """Return what is needed to go on later."""
        ...

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from a snapshot."""
        ...


class BundleReader:
    """An export."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.state = model, model.new_state()

    @property
    def nbytes(self) -> int:
        return self.state.nbytes

    def read(self, ids: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        session, parts, start = self.model.session, [], 0
        while start < len(ids):
            stop = min(len(ids), start + session.step_limit(self.state))
            wanted = rows[(rows >= start) & (rows < stop)] - start
            length = np.array([stop - start])
            found = session.step(self.state, ids[None, start:stop], length, wanted[None])
            parts.append(found[0].copy())
            self.state.advance(length)
            start = stop
        return np.concatenate(parts)

    def snapshot(self) -> Mapping[str, np.ndarray]:
        return self.model.session.snapshot(self.state).to_arrays()

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.model.session.restore(self.state, Snapshot.from_arrays(self.state.contract, arrays))


class StreamingReader:
    """StreamingLLM in torch: sinks and window of the bundle, distances by place in the cache."""

    def __init__(self, model: TorchModel) -> None:
        self.model = model
        self._scorer = CachedScorer(
            model, model.num_sink_tokens, model.window_size, by_cache_place=True
        )
        self._step: Step = self._scorer._step

    @property
    def nbytes(self) -> int:
        return self._scorer.nbytes

    def read(self, ids: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = self.model.logits(ids[None], self._step, torch.from_numpy(rows)[None])[0]
        self._scorer._step.advance(len(ids))
        return logits.numpy()

    def snapshot(self) -> Mapping[str, np.ndarray] | None:
        return self._scorer.snapshot()

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._scorer.restore(arrays)


class TransformersReader:
    """The model as transformers runs it, with its own cache."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM, DynamicCache

        is_gguf = model.suffix == ".gguf"
        self.model = AutoModelForCausalLM.from_pretrained(
            model.parent if is_gguf else model, gguf_file=model.name if is_gguf else None,
            dtype=torch.float32, attn_implementation="sdpa",
        ).eval()  # fmt: skip
        self.cache = DynamicCache(config=self.model.config)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))

    def read(self, ids: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            found = self.model(
                torch.from_numpy(ids)[None], past_key_values=self.cache, use_cache=True,
                logits_to_keep=torch.from_numpy(rows),
            )  # fmt: skip
        return found.logits[0].numpy()

    def snapshot(self) -> None:
        return None

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        raise NotImplementedError


def scored_rows(start: int, stop: int) -> NDArray[np.int64]:
    """Return the rows of a chunk at positions start … stop − 1 whose next token is scored."""
    targets = np.arange(start + 1, stop + 1)
    return np.flatnonzero(targets % (EVERY if stop <= DENSE else SPARSE) == 0)


def read_stream(
    reader: Reader, ids: NDArray[np.int64], tokens: int, kept: Path, identity: Any
) -> dict[str, Any]:
    """Read the first tokens of a stream and return the nats of what was scored.

    Args:
        reader: a method, at the beginning of a stream.
        ids: (T,) the stream, longer than tokens.
        tokens: how many it reads, a multiple of CHUNK.
        kept: file from which an interrupted reading goes on.
        identity: what the numbers depend on.

    Returns:
        ``nats``, the mean of every chunk; ``nats_of_single``, those of every SINGLE-th token;
        ``tokens``; ``seconds``; ``cache_bytes``.
    """
    run: dict[str, Any] = {"nats": [], "nats_of_single": [], "seconds": 0.0, "cache_bytes": 0}
    if kept.exists():
        run = _restored(reader, kept, identity) or run
    saved = time.monotonic()
    while (done := len(run["nats"]) * CHUNK) < tokens:
        begun = time.perf_counter()
        rows = scored_rows(done, done + CHUNK)
        logits = reader.read(ids[done : done + CHUNK], rows)
        targets = done + 1 + rows
        losses = negative_log_likelihood(logits, ids[targets])
        run["seconds"] += time.perf_counter() - begun
        run["nats"].append(round(float(losses.mean(dtype=np.float64)), 6))
        run["nats_of_single"] += [
            round(float(loss), 6)
            for loss, target in zip(losses, targets, strict=True)
            if target % SINGLE == 0
        ]
        run["cache_bytes"] = max(run["cache_bytes"], reader.nbytes)
        if time.monotonic() - saved > SAVE_SECONDS * max(1, reader.nbytes / SAVE_BYTES):
            _save(reader, kept, run, identity)
            saved = time.monotonic()
    _save(reader, kept, run, identity)
    return {**run, "tokens": len(run["nats"]) * CHUNK, "seconds": round(run["seconds"], 1)}


def _save(reader: Reader, kept: Path, run: dict[str, Any], identity: Any) -> None:
    snapshot = reader.snapshot()
    if snapshot is None:
        return
    arrays = {f"cache/{name}": array for name, array in snapshot.items()}
    arrays["meta"] = np.frombuffer(json.dumps({"run": run, "of": identity}).encode(), np.uint8)
    fresh = kept.with_name(f".{kept.name}.{os.getpid()}")
    with fresh.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub declares bool
    fresh.replace(kept)


def _restored(reader: Reader, kept: Path, identity: Any) -> dict[str, Any] | None:
    with np.load(kept) as arrays:
        meta = json.loads(arrays["meta"].tobytes())
        if meta["of"] != identity:
            return None
        names = [name for name in arrays.files if name.startswith("cache/")]
        reader.restore({name.removeprefix("cache/"): arrays[name] for name in names})
    return meta["run"]
