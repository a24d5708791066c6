"""Random cases of the operator: positions, ragged chunks and caches filled as if after a past."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from lminf_export.operator import reference
from lminf_export.operator.rope import RotaryTables, rotary_rows, rotary_tables
from lminf_export.operator.settings import ring_capacity


def _inv_freq(rotary_dim: int, theta: float) -> Tensor:
    pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float32)
    return 1.0 / theta ** (pairs / max(rotary_dim, 1))


@lru_cache(maxsize=64)
def _tables(rotary_dim: int, theta: float, limit: int, attention_factor: float) -> RotaryTables:
    return rotary_tables(_inv_freq(rotary_dim, theta), limit, attention_factor)


@dataclass(frozen=True)
class Case:
    """Sizes and rules of one attention layer."""

    window_size: int = 13
    num_sink_tokens: int = 3
    distance_limit: int | None = None
    chunk_size: int = 7
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 12
    rotary_dim: int = 8
    interleaved: bool = False
    attention_factor: float = 1.0
    softcap: float = 0.0
    alibi: bool = False
    sink_logits: bool = False
    key_bias: float = 0.0
    seed: int = 0
    theta: float = 100.0
    inv_freq: Tensor = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inv_freq", _inv_freq(self.rotary_dim, self.theta))

    @property
    def limit(self) -> int:
        return self.window_size if self.distance_limit is None else self.distance_limit

    @property
    def capacity(self) -> int:
        return ring_capacity(self.window_size, self.chunk_size)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def alibi_slopes(self) -> Tensor:
        slopes = 2.0 ** -torch.arange(1, self.num_heads + 1, dtype=torch.float32)
        return slopes if self.alibi else torch.zeros(self.num_heads)

    @property
    def learned_logits(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        learned = torch.randn(self.num_heads, generator=generator)
        return learned if self.sink_logits else torch.full((self.num_heads,), float("-inf"))

    @property
    def bias(self) -> Tensor:
        """(G, D) of every key: of norm `key_bias` in each head, in a few of its dimensions."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        shape = self.num_kv_heads, self.head_dim
        bias = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 8
        return bias * (self.key_bias / bias.norm(dim=1, keepdim=True))

    def with_(self, **changes: object) -> Case:
        return replace(self, **changes)

    def tables(self) -> RotaryTables:
        return _tables(self.rotary_dim, self.theta, self.limit, self.attention_factor)

    def attributes(self) -> dict[str, int | float]:
        return {
            "num_sink_tokens": self.num_sink_tokens,
            "window_size": self.window_size,
            "distance_limit": self.limit,
            "scale": self.scale,
            "softcap": self.softcap,
            "rotary_dim": self.rotary_dim,
            "rotary_interleaved": self.interleaved,
        }


class History:
    """All keys and values a stream has seen or could still see, by absolute position.

    A stream starts at `base` positions: the first of them (the sinks) and those just before
    the base (a full ring) are random; nothing in between can ever be seen again.
    """

    def __init__(self, case: Case, bases: list[int], length: int, dtype: torch.dtype) -> None:
        self.case, self.bases = case, bases
        self.generator = torch.Generator().manual_seed(case.seed)
        self.positions = []
        for base in bases:
            start = max(0, base - case.capacity)
            early = range(min(case.num_sink_tokens, start))
            self.positions.append([*early, *range(start, base + length)])
        count = max(len(p) for p in self.positions)
        self.position = torch.full((len(bases), count), reference.EMPTY, dtype=torch.int64)
        for row, positions in enumerate(self.positions):
            self.position[row, : len(positions)] = torch.tensor(positions)
        shape = (len(bases), case.num_kv_heads, count, case.head_dim)
        self.keeps_bias = False
        self.bias = case.bias.to(dtype)
        self.key = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)
        self.key += self.bias[None, :, None]
        self.value = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)
        query_shape = (len(bases), case.num_heads, length, case.head_dim)
        self.query = torch.randn(query_shape, generator=self.generator, dtype=torch.float64).to(
            dtype
        )

    def oracle(self, rounded: reference.Rounding | None = None) -> Tensor:
        """Outputs (B, H, length, D) of every query, in float64, by distances alone.

        With ``rounded`` the ring keeps what that makes of keys and values.
        """
        case = self.case
        length = self.query.shape[2]
        query_position = torch.tensor(self.bases)[:, None] + torch.arange(length)
        return reference.attend_by_distance(
            self.query.double(),
            self.key.double(),
            self.value.double(),
            query_position,
            self.position,
            window_size=case.window_size,
            num_sink_tokens=case.num_sink_tokens,
            distance_limit=case.limit,
            scale=case.scale,
            inv_freq=case.inv_freq if case.rotary_dim else None,
            attention_factor=case.attention_factor,
            interleaved=case.interleaved,
            softcap=case.softcap,
            alibi_slopes=case.alibi_slopes,
            sink_logits=case.learned_logits,
            rounded=rounded,
            key_bias=self.bias if case.key_bias and not self.keeps_bias else None,
        )

    def with_bias_in_the_ring(self) -> History:
        """The same history of a ring that rounds keys with their bias."""
        other = copy(self)
        other.keeps_bias = True
        return other

    def without_bias(self) -> History:
        """The same history with keys as a ring holds that keeps their bias out, in float32."""
        other = copy(self)
        other.key = self.key.to(reference.real_type(self.key)) - self.bias[None, :, None]
        return other

    def caches(self, capacity: int) -> list[Tensor]:
        """Ring key, ring value, sink key, sink value as they stand before the first query."""
        case = self.case
        rows, dtype = len(self.bases), self.key.dtype
        ring = torch.zeros(rows, case.num_kv_heads, capacity, case.head_dim, dtype=dtype)
        # Without sink tokens the sinks are a constant of one row, as the graph passes them.
        sink_rows = rows if case.num_sink_tokens else 1
        sink_slots = max(case.num_sink_tokens, 1)
        sink = torch.zeros(sink_rows, case.num_kv_heads, sink_slots, case.head_dim)
        out = [ring, ring.clone(), sink.to(dtype), sink.to(dtype).clone()]
        tables = case.tables()
        for row, base in enumerate(self.bases):
            for column, position in enumerate(self.positions[row]):
                if position >= base:
                    break
                key, value = self.key[row, :, column], self.value[row, :, column]
                if position < case.num_sink_tokens:
                    out[2][row, :, position], out[3][row, :, position] = key, value
                if position >= base - capacity:
                    out[0][row, :, position % capacity] = self._rotated(key, position, tables)
                    out[1][row, :, position % capacity] = value
        return out

    def _rotated(self, key: Tensor, position: int, tables: RotaryTables) -> Tensor:
        if not self.case.rotary_dim:
            return key
        cos, sin = rotary_rows(torch.tensor([position]), tables.cos, tables.sin)
        turned = reference.rotate(key.float(), cos, sin, interleaved=self.case.interleaved)
        return turned.to(key.dtype)

    def chunk(self, past: Tensor, new: Tensor, width: int) -> list[Tensor]:
        """query, key, value (B, ·, width, D) of the next tokens; padding is random, not zero."""
        parts = []
        for source, is_query in ((self.query, True), (self.key, False), (self.value, False)):
            shape = (*source.shape[:2], width, source.shape[3])
            part = torch.randn(shape, generator=self.generator).to(source.dtype) * 5
            for row, base in enumerate(self.bases):
                first = 0 if is_query else self.positions[row].index(base)
                first += int(past[row]) - base
                count = int(new[row])
                part[row, :, :count] = source[row, :, first : first + count]
            parts.append(part)
        return parts


def shared_inputs(case: Case, past: Tensor, new: Tensor, width: int, capacity: int) -> list[Tensor]:
    """The operator's inputs from past_length on, in order."""
    query_position = past[:, None] + torch.arange(width)
    slots = reference.slot_positions(past, new, capacity)
    rows = [torch.ones(1, 1, 1)] * 2 + [torch.ones(1)] * 2
    if case.rotary_dim:
        tables = case.tables()
        cos, sin = rotary_rows(query_position, tables.cos, tables.sin)
        rows = [cos, sin, tables.limit_cos, tables.limit_sin]
    return [past, new, query_position, slots, *rows, case.alibi_slopes, case.learned_logits]
