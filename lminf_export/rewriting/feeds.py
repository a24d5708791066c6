"""The inputs of a foreign graph by what they mean, and arrays for them.

Decoders take their tokens' ids and describe the rest in a few ways: a mask over all tokens, their
positions, caches of the tokens before. Each input is recognised by its name and shape; an unknown
one ends the rewrite, since what it means could not be kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lminf_export.errors import ModelError, shortened

Array = NDArray[Any]
Role = Literal[
    "ids",
    "mask",
    "mask_4d",
    "positions",
    "cache_positions",
    "write_index",
    "past_length",
    "total_length",
    "last_index",
    "keep",
    "cache",
]
_NAMES: dict[str, Role] = {
    "input_ids": "ids",
    "tokens": "ids",
    "attention_mask": "mask",
    "position_ids": "positions",
    "positions": "positions",
    "cache_position": "cache_positions",
    "write_indices": "write_index",
    "past_length": "write_index",
    "past_sequence_length": "past_length",
    "past_seq_len": "last_index",
    "seqlens_k": "last_index",
    "total_sequence_length": "total_length",
    "total_seq_len": "total_length",
    "nonpad_kv_seqlen": "total_length",
    "num_logits_to_keep": "keep",
    "logits_to_keep": "keep",
}
_LARGEST_CACHE = 2**29  # elements
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Inputs:
    """A graph's inputs by their roles.

    Attributes:
        ids: the tokens.
        roles: every input and its role.
        in_place: whether caches have slots for the new tokens, which are written into them.
        views: for caches that lie otherwise than (B, G, P, D) the values that are them in that
            layout.
    """

    ids: ir.Value
    roles: Mapping[ir.Value, Role]
    in_place: bool = False
    views: Mapping[ir.Value, tuple[ir.Value, ...]] = field(default_factory=dict)

    @property
    def caches(self) -> list[ir.Value]:
        """The keys or values of earlier tokens, (B, G, P, D): inputs, or their views."""
        inputs = [value for value, role in self.roles.items() if role == "cache"]
        return [view for value in inputs for view in self.views.get(value, (value,))]

    @property
    def positional(self) -> list[ir.Value]:
        """All inputs but the tokens: what a token's place in the text decides."""
        return [value for value, role in self.roles.items() if role not in ("ids", "keep")]

    @property
    def slots(self) -> int | None:
        """The tokens that the smallest cache of fixed size holds, None without one."""
        sizes = [value.shape[2] for value in self.caches if value.shape is not None]
        return min((size for size in sizes if isinstance(size, int)), default=None)

    def feeds(self, call: Call) -> dict[ir.Value, Array]:
        """Return arrays for all inputs: one token again and again, caches of zeros."""
        call = self._completed(call)
        return {value: _array(value, role, call) for value, role in self.roles.items()}

    def empty_cache(self, value: ir.Value, call: Call) -> Array:
        """Return zeros for a cache, an input or a view of one."""
        return _array(value, "cache", self._completed(call))

    def _completed(self, call: Call) -> Call:
        if self.in_place and call.capacity is None:
            return replace(call, capacity=call.total)
        return call


@dataclass(frozen=True)
class Call:
    """One run of a graph.

    Attributes:
        new: tokens that are new, S.
        past: tokens before them, P.
        head_dims: of each cache whose last dimension the graph leaves open.
        capacity: slots of caches that are written in place, by default P.
    """

    new: int
    past: int = 0
    head_dims: Mapping[str, int] | None = None
    capacity: int | None = None

    @property
    def total(self) -> int:
        """All tokens, P + S."""
        return self.past + self.new


def read_inputs(graph: ir.Graph) -> Inputs:
    """Recognise a graph's inputs.

    Raises:
        ModelError: naming one that is not understood.
    """
    roles: dict[ir.Value, Role] = {}
    for value in graph.inputs:
        if value.name in graph.initializers:
            continue
        roles[value] = _role(value)
    ids = [value for value, role in roles.items() if role == "ids"]
    if len(ids) != 1:
        raise ModelError(_no_ids([str(value.name) for value in roles]))
    return Inputs(ids[0], roles)


def _no_ids(names: Iterable[str]) -> str:
    listed = ", ".join(sorted(names)[:6])
    return f"the graph has no input input_ids (it has {listed}): it is no decoder of tokens"


def _role(value: ir.Value) -> Role:
    name, rank = str(value.name), len(value.shape) if value.shape is not None else None
    if name in _NAMES:
        role = _NAMES[name]
        if role == "mask" and rank == 4:
            return "mask_4d"
        if role == "positions" and rank == 1:
            return "cache_positions"
        if role == "positions" and rank == 3:
            raise ModelError(
                f"the input {name} has three rows of positions (multimodal rotation), which a "
                f"stream of text alone does not need; export the text model"
            )
        return role
    both = value.shape is not None and rank == 5 and value.shape[0] == 2
    if value.dtype in _FLOATS and (rank == 4 or both):
        return "cache"
    if "embeds" in name:
        raise ModelError(
            f"the graph takes {shortened(name, 40)} instead of token ids: its embedding is another "
            f"file; export the model with its embedding"
        )
    if name == "use_cache_branch":
        raise ModelError(
            "the graph is a merged decoder (use_cache_branch chooses between two graphs); give "
            "the one with a past alone, decoder_with_past_model.onnx, or export it without merging"
        )
    if value.dtype in (ir.DataType.INT8, ir.DataType.UINT8) and rank == 4:
        raise ModelError(
            f"the cache {name} is quantised ({value.dtype}); rewriting takes caches of the model's "
            f"own element type: export the model without a quantised cache"
        )
    raise ModelError(
        f"the input {shortened(name, 60)} of {value.dtype} and rank {rank} is not understood; "
        f"expected input_ids, attention_mask, position_ids and a cache for each layer"
    )


def numpy_dtype(value: ir.Value) -> np.dtype[Any]:
    """Return numpy's type of a value."""
    if value.dtype == ir.DataType.BFLOAT16:
        return np.dtype(ml_dtypes.bfloat16)
    assert value.dtype is not None
    return value.dtype.numpy()


def _array(value: ir.Value, role: Role, call: Call) -> Array:
    dtype = numpy_dtype(value)
    positions = np.arange(call.past, call.total)
    rank = len(value.shape) if value.shape is not None else 0
    match role:
        case "ids":
            return np.ones((1, call.new), dtype)
        case "mask":
            return np.ones((1, call.total), dtype)
        case "mask_4d":
            row = np.arange(call.total)[None] <= positions[:, None]
            shown = row if dtype == np.bool_ else np.where(row, 0.0, np.finfo(np.float32).min / 2)
            return shown[None, None].astype(dtype)
        case "positions":
            return positions[None].astype(dtype)
        case "cache_positions":
            return positions.astype(dtype)
        case "write_index" | "past_length":
            return np.full((1,) * rank, call.past, dtype)
        case "total_length":
            return np.full((1,) * rank, call.total, dtype)
        case "last_index":
            return np.full((1,) * rank, call.total - 1, dtype)
        case "keep":
            return np.full((1,) * rank, call.new, dtype)
        case "cache":
            return np.zeros(cache_shape(value, call), dtype)


def cache_axis(value: ir.Value) -> int:
    """Return the axis of a cache along which its tokens lie."""
    assert value.shape is not None
    if len(value.shape) == 5:
        return 3
    open_then_fixed = not isinstance(value.shape[1], int) and isinstance(value.shape[2], int)
    return 1 if open_then_fixed else 2


def cache_shape(value: ir.Value, call: Call) -> tuple[int, ...]:
    """Return (1, G, slots, D) of a cache; (1, slots, G, D) or (2, 1, G, slots, D) of others."""
    assert value.shape is not None
    axis = cache_axis(value)
    heads_axis = 2 if len(value.shape) == 5 or axis == 1 else 1
    heads, slots, dim = value.shape[heads_axis], value.shape[axis], value.shape[-1]
    if not isinstance(dim, int):
        known = (call.head_dims or {}).get(str(value.name))
        if known is None:
            raise ModelError(
                f"the head dimension of the cache {value.name} is not in the graph; "
                f"expected shape (batch, heads, tokens, dimension), found {value.shape}"
            )
        dim = known
    if not isinstance(heads, int):
        raise ModelError(
            f"the cache {value.name} has an unknown number of heads: its shape is {value.shape}"
        )
    if not isinstance(slots, int):
        slots = call.past if call.capacity is None else call.capacity
    if not 0 <= heads * slots * dim <= _LARGEST_CACHE:
        raise ModelError(
            f"the cache {value.name} of shape {value.shape} is larger than anything that can be "
            f"tried here; expected (batch, heads, tokens, dimension) with its tokens left open"
        )
    shape = (1, slots, heads, dim) if axis == 1 else (1, heads, slots, dim)
    return (2, *shape) if len(value.shape) == 5 else shape
