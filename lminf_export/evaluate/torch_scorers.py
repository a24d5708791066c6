"""The methods a bundle is compared with, in torch, from the same weights, by the family's code.

- stock: the unmodified model. Every key stays, every distance is true.
- window: the last W keys and nothing else.
- streaming: StreamingLLM (arXiv 2309.17453). Sinks and window as in Λ, but distances are those
  of the places in the cache, so that a sink's distance is its place's and not one constant.
- recompute: for each target the last W tokens are read afresh, from position 0, behind the
  start token: the best a context of W tokens can do, at W times the cost.
- reference: Λ by `reference.attend_by_distance`, to check the export itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lminf_export.bundle.folder import Bundle
from lminf_export.checkpoint.opening import Checkpoint, load_model, open_checkpoint
from lminf_export.checkpoint.source import open_source
from lminf_export.evaluate.baselines import UNBOUNDED, CachedStep
from lminf_export.evaluate.scorers import Arrays
from lminf_export.models.base import ATTENTION_NAME, Step
from lminf_export.models.history import HistoryStep
from lminf_export.models.registry import family_of
from lminf_export.models.steps import run
from lminf_export.verify.bundle_weights import reference_checkpoint
from lminf_export.verify.reference_model import bundle_plan, rounding_of
from lminf_export.verify.rewritten import require_weights

CHUNK_SIZE = 256
# A snapshot is written many times; a history larger than this is read again instead.
MAX_SNAPSHOT_BYTES = 2**28
# Tokens of a batch of short contexts.
BATCH_TOKENS = 4096


class TorchModel:
    """A bundle's model in torch float32, opened so that its attention can be replaced.

    Args:
        bundle: opened.
        model: another model that has the weights; the bundle by default.
        trust_remote_code: run Python that its repository, or the bundle, brings.
    """

    def __init__(
        self, bundle: Bundle, model: str | None = None, *, trust_remote_code: bool = False
    ) -> None:
        require_weights(bundle.manifest, model)
        source = open_source(
            model if model is not None else bundle.path, trust_remote_code=trust_remote_code
        )
        self._family, original = family_of(source.config), open_checkpoint(source)
        self.plan = bundle_plan(bundle, self._family, original)
        self._model = _load(bundle, original, own_weights=model is None)
        self.rounded = rounding_of(bundle)
        self.window_size = bundle.manifest.lambda_config.window_size
        self.num_sink_tokens = bundle.manifest.lambda_config.num_sink_tokens

    @contextmanager
    def _open(self) -> Iterator[Any]:
        with torch.no_grad(), self._family.patched(self._model):
            yield self._model

    def logits(self, tokens: NDArray[np.int64], step: Step, rows: Tensor) -> Tensor:
        """Return logits (B, K, V) float32 of tokens (B, S), rows (B, K) of S."""
        with self._open() as model:
            return run(model, torch.from_numpy(tokens), step, rows).float()

    def losses(self, tokens: NDArray[np.int64], targets: NDArray[np.int64], step: Step) -> Any:
        """Return the nats (S,) of the targets behind each of the tokens (S,)."""
        rows = torch.arange(len(tokens))[None]
        logits = self.logits(tokens[None], step, rows)[0]
        loss = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(targets), reduction="none"
        )
        return loss.numpy()


def _load(bundle: Bundle, original: Checkpoint, own_weights: bool) -> Any:
    """Load the weights in float32: the bundle's, dequantised where needed, or another model's."""
    if not own_weights:
        return load_model(original, torch.float32, ATTENTION_NAME)
    return load_model(reference_checkpoint(bundle, original), torch.float32, ATTENTION_NAME)


class CachedScorer:
    """A comparison that reads the stream once, over a history of keys.

    Args:
        model: the model in torch.
        num_sink_tokens: starting tokens that stay.
        window_size: last keys that are seen; UNBOUNDED for all.
        by_cache_place: distances as StreamingLLM takes them.
    """

    chunk_size = CHUNK_SIZE

    def __init__(
        self, model: TorchModel, num_sink_tokens: int, window_size: int, by_cache_place: bool
    ) -> None:
        self._model = model
        self._step = CachedStep(model.plan, num_sink_tokens, window_size, by_cache_place)

    @property
    def nbytes(self) -> int:
        """See `Scorer.nbytes`."""
        return self._step.nbytes

    def score(self, tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Scorer.score`."""
        losses = self._model.losses(tokens, targets, self._step)
        self._step.advance(len(tokens))
        return losses

    def snapshot(self) -> Arrays | None:
        """Return the history, unless it is very large."""
        if self.nbytes > MAX_SNAPSHOT_BYTES:
            return None
        parts = {
            f"{layer}.{index}": part.numpy()
            for layer, history in self._step.history.items()
            for index, part in enumerate(history)
        }
        return {"past_length": np.array(self._step.past_length), **parts}

    def restore(self, arrays: Arrays) -> None:
        """See `Scorer.restore`."""
        self._step.past_length = int(arrays["past_length"])
        for layer in range(len(self._model.plan.layers)):
            parts = (arrays[f"{layer}.{index}"] for index in range(3))
            self._step.history[layer] = [torch.from_numpy(part) for part in parts]


class ReferenceScorer:
    """Λ-attention by the specification, from explicit keys and distances, in torch."""

    chunk_size = CHUNK_SIZE
    nbytes = 0

    def __init__(self, model: TorchModel) -> None:
        self._model = model
        self._step = HistoryStep(model.plan, rounded=model.rounded)

    def score(self, tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Scorer.score`."""
        self._step.begin(torch.tensor([len(tokens)]))
        return self._model.losses(tokens, targets, self._step)

    def snapshot(self) -> Arrays | None:
        """Return None: it starts again."""
        return None

    def restore(self, arrays: Arrays) -> None:
        """Never called: it has no snapshots."""
        raise NotImplementedError


def stock_scorer(model: TorchModel) -> CachedScorer:
    """Return the unmodified model with its full cache."""
    return CachedScorer(model, 0, UNBOUNDED, by_cache_place=False)


def window_scorer(model: TorchModel) -> CachedScorer:
    """Return a plain sliding window of W keys."""
    return CachedScorer(model, 0, model.window_size, by_cache_place=False)


def streaming_scorer(model: TorchModel) -> CachedScorer:
    """Return StreamingLLM with the bundle's sinks and window."""
    return CachedScorer(model, model.num_sink_tokens, model.window_size, by_cache_place=True)


def recompute(
    model: TorchModel,
    tokens: NDArray[np.int64],
    num_start_tokens: int,
    targets: Sequence[int],
    window: int,
) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """Score each target from the last ``window`` tokens before it, read afresh.

    Args:
        model: the model in torch.
        tokens: (T,) the stream.
        num_start_tokens: of the stream; they stand before every truncated context and count
            among its tokens.
        targets: positions 1 … T − 1, ascending.
        window: tokens of a context.

    Yields:
        Batches of targets and their nats.
    """
    batch_size = max(1, BATCH_TOKENS // window)
    short = [target for target in targets if target <= window]
    long = [target for target in targets if target > window]
    batches = [[target] for target in short]
    batches += [long[i : i + batch_size] for i in range(0, len(long), batch_size)]
    start = tokens[:num_start_tokens]
    kept = window - num_start_tokens
    for batch in batches:
        if batch[0] <= window:
            contexts = tokens[None, : batch[0]]
        else:
            contexts = np.stack([np.append(start, tokens[t - kept : t]) for t in batch])
        step = CachedStep(model.plan, 0, UNBOUNDED, by_cache_place=False)
        last = torch.full((len(batch), 1), contexts.shape[1] - 1)
        logits = model.logits(contexts, step, last)[:, 0]
        wanted = torch.from_numpy(tokens[batch])
        loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        yield batch, loss.numpy()
