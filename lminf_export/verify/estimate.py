"""How long a validation takes and how much memory it needs, before it starts."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lminf_export.bundle.files import human_bytes
from lminf_export.checkpoint.opening import Checkpoint
from lminf_export.errors import InputError
from lminf_export.models.expert_facts import experts_per_token
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.tensors.memory import available_memory
from lminf_export.verify.comparison import BLOCK_ELEMENTS
from lminf_export.verify.logits_comparison import WAYS
from lminf_export.verify.reference_model import WIDTH

# Imports that come later, buffers, and what an allocator does not give back.
_MARGIN = 300 * 2**20
# Activations of one block of tokens that exist together, of the widest kind.
_ACTIVATIONS = 5
_LAYER = re.compile(r"^.*?\.\d+\.")
_SAMPLE = 2**20


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that decide about time and memory.

    Attributes:
        layer: elements of the largest layer.
        layers: elements of all layers that a token meets.
        widest: most elements of one activation of a token.
        hidden: H.
        vocab: V.
    """

    layer: int
    layers: int
    widest: int
    hidden: int
    vocab: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Sizes:
        """Read them from the shapes of a model's tensors."""
        config = checkpoint.source.config
        per_layer: Counter[str] = Counter()
        met, widest = 0, config.hidden_size
        for name, shape in checkpoint.skeleton.shapes.items():
            if (place := _LAYER.match(name)) is None:
                continue
            per_layer[place[0]] += math.prod(shape)
            share = 1.0
            if len(shape) > 2:  # a stack of experts
                share = min(1.0, (experts_per_token(config) or shape[0]) / shape[0])
            met += int(math.prod(shape) * share)
            widest = max(widest, *shape[-2:])
        return cls(
            layer=max(per_layer.values(), default=0),
            layers=met,
            widest=widest,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
        )


@dataclass(frozen=True)
class Estimate:
    """Time and memory that a validation is expected to take.

    Attributes:
        seconds: of time.
        num_bytes: of memory, beside files that are mapped.
    """

    seconds: float
    num_bytes: int

    @property
    def description(self) -> str:
        """Both in words."""
        return f"about {human_time(self.seconds)} and {human_bytes(self.num_bytes)} of memory"

    def require_room(self, max_hours: float) -> None:
        """Refuse what does not fit.

        Raises:
            InputError: naming what is needed, what there is, and what helps.
        """
        available = available_memory()
        if self.num_bytes > available:
            raise InputError(
                f"this validation needs about {human_bytes(self.num_bytes)} of memory, "
                f"{human_bytes(available)} is available; a smaller --window or fewer --tokens "
                f"need less"
            )
        if self.seconds > max_hours * 3600:
            raise InputError(
                f"this validation would take about {human_time(self.seconds)}, the limit is "
                f"{human_time(max_hours * 3600)}; a smaller --window or fewer --tokens take less, "
                f"--max-hours sets the limit"
            )


def estimate(
    model: LanguageModel,
    checkpoint: Checkpoint,
    num_tokens: int,
    dtypes: list[torch.dtype],
    *,
    apart: bool,
) -> Estimate:
    """Estimate a validation from a few measurements on this machine.

    Args:
        model: the bundle's; a few tokens are run.
        checkpoint: the reference's.
        num_tokens: T.
        dtypes: of each pass through the reference; the first is the reference itself.
        apart: each way of running has a reference of its own: under the bundle's routing, over
            its int8 rings.
    """
    sizes = Sizes.of(checkpoint)
    return Estimate(
        _seconds(model, sizes, num_tokens, dtypes, apart=apart),
        _bytes(model, sizes, num_tokens, dtypes),
    )


def _bytes(model: LanguageModel, sizes: Sizes, num_tokens: int, dtypes: list[torch.dtype]) -> int:
    widest = max(dtype.itemsize for dtype in dtypes)
    kept = num_tokens * sizes.hidden * sum(dtype.itemsize for dtype in dtypes)
    activations = min(num_tokens, WIDTH) * sizes.widest * _ACTIVATIONS * widest
    hidden = 2 * num_tokens * sizes.hidden * widest
    passing = sizes.layer * widest + activations + hidden
    rows = min(num_tokens, max(1, BLOCK_ELEMENTS // sizes.vocab))
    largest_piece = min(rows, max(max(way) for _, way in WAYS))
    pieces = 2 * largest_piece * sizes.vocab * np.dtype(np.float32).itemsize * len(WAYS)
    comparing = rows * sizes.vocab * widest * 2 + pieces
    states = model.bundle.manifest.cache_bytes_per_sequence * len(WAYS)
    contract = model.bundle.manifest.contract
    recorded = sum(
        contract.layer_bytes(layer, num_tokens, 0)
        for layer in contract.layers
        if contract.int8_cache
    )
    return int(kept + states + recorded + max(passing, comparing) + _MARGIN)


def _seconds(
    model: LanguageModel,
    sizes: Sizes,
    num_tokens: int,
    dtypes: list[torch.dtype],
    *,
    apart: bool,
) -> float:
    one, many, count = _bundle_seconds(model)
    runs = num_tokens * (one + many / count)
    seconds = runs * (2 if apart else 1)
    blocks = max(1.0, num_tokens * sizes.vocab / BLOCK_ELEMENTS)
    head = sizes.vocab * sizes.hidden
    for dtype in dtypes:
        product, copying = _product_seconds(dtype), _copy_seconds(dtype)
        passing = sizes.layers * (2 * num_tokens * product + copying)
        logits = head * (2 * num_tokens * product + blocks * copying)
        seconds += (passing + logits) * (len(WAYS) if apart else 1)
    return seconds


def _bundle_seconds(model: LanguageModel) -> tuple[float, float, int]:
    """Return the seconds of a single token, and of a chunk with the number of its tokens."""
    count = min(16, model.bundle.manifest.settings.chunk_size)
    state = model.new_state(1)
    model.forward([[0]], state)  # maps the weights
    one = _timed(lambda: model.forward([[0]], state))
    many = _timed(lambda: model.forward([[0] * count], state))
    return one, many, count


def _product_seconds(dtype: torch.dtype) -> float:
    """Return the seconds of one multiplication and addition's half in a product of matrices."""
    left, right = torch.ones(WIDTH, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    left @ right
    return _timed(lambda: left @ right) / (2 * WIDTH * 512 * 512)


def _copy_seconds(dtype: torch.dtype) -> float:
    """Return the seconds of reading one weight in another type."""
    source, place = torch.zeros(_SAMPLE, dtype=torch.float16), torch.empty(_SAMPLE, dtype=dtype)
    place.copy_(source)
    return _timed(lambda: place.copy_(source)) / _SAMPLE


def _timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def human_time(seconds: float) -> str:
    """Return a duration in words, such as "3 min"."""
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{math.ceil(seconds)} s"
