"""Λ-attention in plain torch: the specification every other form is tested against.

Two descriptions of one thing.

`attend_by_distance` is the mathematics: explicit keys at explicit positions, every rotation
taken from a *difference* of positions. It knows no cache.

`lambda_attention` is the operator: the same result from a ring and a few sink slots of
fixed size, with keys stored rotated at their absolute position. It is what the graph, the
engines and the kernels compute.

Letters: B batch, H query heads, G key/value heads (G divides H), S new tokens, M keys,
C ring slots, N sink tokens, D head dimension, R ≤ D rotated dimensions.
W window_size (the query's own key included), L distance_limit.

Source: arXiv 2308.16137 (LM-Infinite); docs/operator.md derives each rule.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]

EMPTY = -1  # a slot position below zero: no token is there
_ONE_ROTATION = 2**20  # positions of 20 bits times a float32 frequency are exact in float64


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the first R dimensions of x; the others pass through.

    Half-split pairs dimension i with i + R/2, interleaved pairs 2i with 2i + 1:
    (a, b) → (a·cos − b·sin, b·cos + a·sin).

    Args:
        x: (..., D).
        cos: broadcastable to (..., R/2), dimensionless.
        sin: the same shape as cos.
        interleaved: which dimensions form a pair.

    Returns:
        Tensor of the shape of x.
    """
    half = cos.shape[-1]
    turned, passed = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        pairs = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((pairs, passed), dim=-1)


def is_local(distance: Tensor, window_size: int) -> Tensor:
    """0 ≤ p − j ≤ W − 1: the key is inside the window, exactly W keys of them."""
    return (distance >= 0) & (distance < window_size)


def is_sink(
    distance: Tensor, key_position: Tensor, window_size: int, num_sink_tokens: int
) -> Tensor:
    """p − j ≥ W and 0 ≤ j < N: a starting token that has left the window."""
    return (distance >= window_size) & (key_position >= 0) & (key_position < num_sink_tokens)


def attend_by_distance(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    *,
    window_size: int,
    num_sink_tokens: int,
    distance_limit: int,
    scale: float,
    inv_freq: Tensor | None = None,
    attention_factor: float = 1.0,
    interleaved: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    rounded: Rounding | None = None,
    rounded_value: Rounding | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Attend from explicit queries to explicit keys; rotations come from distances alone.

    For a local pair the logit is (R_{p−j} q)·k·scale, for a sink (R_L q)·k·scale, each times
    attention_factor² (YaRN multiplies cos and sin by it on both sides). R_{p−j} is computed
    as R_{p−b} and R_{j−b} with b the row's first query position, so that every angle is
    small and float64 is exact whatever p is.

    A ring that rounds what it holds rounds a key as rotated at its absolute position. Rounding
    does not commute with rotation, so the distance alone does not determine the result then.

    Args:
        query: (B, H, S, D), not rotated.
        key: (B, G, M, D), not rotated.
        value: (B, G, M, D).
        query_position: (B, S) int64, absolute token indices.
        key_position: (B, M) int64; negative where there is no key.
        window_size: W, keys.
        num_sink_tokens: N, tokens.
        distance_limit: L, tokens.
        scale: factor of every logit.
        inv_freq: (R/2,) radians per token, or None for a model without rotation.
        attention_factor: YaRN's factor on cos and sin.
        interleaved: pairing of the rotated dimensions.
        softcap: c > 0 replaces a logit x by c·tanh(x / c); 0 leaves it.
        alibi_slopes: (H,) slopes m; adds −m·(p − j) to local logits, −m·L to sinks.
        sink_logits: (H,) learned logits that join the softmax's denominator.
        rounded: what the ring makes of a local key, rotated at its position, such as
            `reference_int8.round_to_int8`; None for a ring that holds all as it is.
        rounded_value: what that ring makes of a value; by default the same.
        key_bias: (G, D) part of every key that a ring that rounds does not hold; None for none.

    Returns:
        (B, H, S, D) in the type of query; a query that sees no key yields zeros.
    """
    base = torch.zeros_like(query_position[:, :1]) if rounded else query_position[:, :1]
    groups = query.shape[1] // key.shape[1]

    def turned_at(x: Tensor, position: Tensor) -> Tensor:
        if inv_freq is None:
            return x
        turn = _rotate_at_any if rounded else _rotate_at
        return turn(x, position - base, inv_freq, attention_factor, interleaved)

    local_query, sink_query = turned_at(query, query_position), query
    if inv_freq is not None:
        limit = torch.full_like(base, distance_limit)
        sink_query = _rotate_at(query, limit, inv_freq, attention_factor**2, interleaved)
    local_value = value
    if rounded is None:
        local_key = turned_at(key, key_position)
    else:
        bias = torch.zeros_like(key[:1, :, :1])
        if key_bias is not None:
            bias = key_bias.to(key.dtype)[None, :, None]
        local_key = rounded(turned_at(key - bias, key_position)).to(key.dtype)
        local_key = local_key + turned_at(bias.expand_as(key), key_position)
        local_value = (rounded_value or rounded)(value).to(value.dtype)
    key, value, local_key, local_value = (
        _heads(x, groups) for x in (key, value, local_key, local_value)
    )
    distance = query_position[:, :, None] - key_position[:, None, :]
    present = (key_position >= 0)[:, None, :]
    local = is_local(distance, window_size) & present
    sink = is_sink(distance, key_position[:, None, :], window_size, num_sink_tokens)
    logits = torch.where(
        sink[:, None], sink_query @ key.transpose(-1, -2), local_query @ local_key.transpose(-1, -2)
    )
    logits = _cap(logits * scale, softcap)
    if alibi_slopes is not None:
        seen = distance.masked_fill(sink, distance_limit)[:, None].to(logits.dtype)
        logits = logits - alibi_slopes.to(logits.dtype)[:, None, None] * seen
    logits = logits.masked_fill(~(local | sink)[:, None], float("-inf"))
    weights = _softmax(logits, sink_logits).to(value.dtype)
    if rounded is None:
        return weights @ value
    of_sinks = weights.masked_fill(~sink[:, None], 0.0)
    return of_sinks @ value + (weights - of_sinks) @ local_value


def slot_positions(past_length: Tensor, new_length: Tensor, capacity: int) -> Tensor:
    """Return which token each ring slot holds once the new ones are written.

    With T = past_length + new_length, slot s holds a = T−1 − ((T−1−s) mod C), the newest
    position congruent to s; a < 0 means empty.

    Args:
        past_length: (B,) int64, tokens seen before this step.
        new_length: (B,) int64, real tokens of this step.
        capacity: C, slots.

    Returns:
        (B, C) int64.
    """
    last = (past_length + new_length - 1)[:, None]
    slot = torch.arange(capacity, device=past_length.device)
    # A tensor, not a number: torch.export keeps a symbolic capacity only this way.
    return last - torch.remainder(last - slot, torch.full_like(last, capacity))


def write_ring(past: Tensor, new: Tensor, past_length: Tensor) -> Tensor:
    """Write S new rows into slots (past_length + s) mod C of each sequence.

    Padding behind a short row is written too: with C ≥ W + S − 1 it only reaches slots whose
    tokens have left the window for good (docs/operator.md proves it), so their content is
    finite but means nothing.

    Args:
        past: (B, G, C, D).
        new: (B, G, S, D), S ≤ C.
        past_length: (B,) int64.

    Returns:
        (B, G, C, D), a new tensor.
    """
    steps = torch.arange(new.shape[2], device=new.device)
    slot = torch.remainder(past_length[:, None] + steps, past.shape[2])
    return past.scatter(2, slot[:, None, :, None].expand_as(new), new)


def write_sinks(past: Tensor, new: Tensor, past_length: Tensor, new_length: Tensor) -> Tensor:
    """Put a new token at position p < N into sink slot p; all other slots keep their token.

    Args:
        past: (B, G, N, D), or (1, G, 1, D) for a layer without sink tokens.
        new: (B, G, S, D), not rotated.
        past_length: (B,) int64.
        new_length: (B,) int64; rows from new_length on are padding and are not written.

    Returns:
        (B, G, N, D), a new tensor.
    """
    past = past.expand(new.shape[0], -1, -1, -1)  # without sink tokens it is a constant of one row
    step = torch.arange(past.shape[2], device=new.device) - past_length[:, None]
    arrives = (step >= 0) & (step < new_length[:, None])
    source = step.clamp(0, new.shape[2] - 1)[:, None, :, None].expand_as(past)
    return torch.where(arrives[:, None, :, None], new.gather(2, source), past)


def lambda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_sink_key: Tensor,
    past_sink_value: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    query_position: Tensor,
    slot_position: Tensor,
    cos: Tensor,
    sin: Tensor,
    limit_cos: Tensor,
    limit_sin: Tensor,
    alibi_slopes: Tensor,
    sink_logits: Tensor,
    *,
    num_sink_tokens: int,
    window_size: int,
    distance_limit: int,
    scale: float,
    softcap: float,
    rotary_dim: int,
    rotary_interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Write the new keys and values, then attend over [sinks | updated ring].

    Floating tensors share one type T unless stated. Rotation, logits and softmax are done in
    float32, or float64 where T is float64.

    Args:
        query: (B, H, S, D) T, not rotated, after any QK-norm.
        key: (B, G, S, D) T, not rotated.
        value: (B, G, S, D) T.
        past_key: (B, G, C, D) T; slot p mod C holds the key of position p, rotated at p.
        past_value: (B, G, C, D) T.
        past_sink_key: (B, G, max(N, 1), D) T, keys of positions 0 … N−1, not rotated.
            With N = 0 the sink tensors are constants that no query sees; B may then be 1.
        past_sink_value: like past_sink_key.
        past_length: (B,) int64, tokens each row has seen before this step.
        new_length: (B,) int64, 0 … S, real tokens of the step; the rest of the row is padding.
        query_position: (B, S) int64, past_length + 0 … S−1. This and slot_position follow
            from the lengths; they are inputs so that all layers share one computation.
        slot_position: (B, C) int64, `slot_positions(past_length, new_length, C)`.
        cos: (B, S, R/2) float32 (or T), cos of the new tokens' absolute positions, times the
            attention factor m. Any small constant when rotary_dim = 0.
        sin: like cos.
        limit_cos: (R/2,) cos at distance L, times m² (sink keys are stored without m).
        limit_sin: like limit_cos.
        alibi_slopes: (H,) float32; zeros for a model without ALiBi.
        sink_logits: (H,) float32 learned logits; −inf for a model without them.
        num_sink_tokens: N.
        window_size: W; C ≥ W + S − 1 once any row has wrapped.
        distance_limit: L.
        scale: factor of every logit.
        softcap: c of c·tanh(x / c), 0 for none.
        rotary_dim: R, 0 for a model without rotation.
        rotary_interleaved: pairing of the rotated dimensions.

    Returns:
        output (B, H, S, D) T; present_key, present_value (B, G, C, D) T;
        present_sink_key, present_sink_value like their pasts. Rows of output behind
        new_length are finite and mean nothing.
    """
    turn = partial(turned, rotary_dim=rotary_dim, interleaved=rotary_interleaved)
    local_query, local_key = turn(query, cos, sin), turn(key, cos, sin)
    sink_query = turn(query, limit_cos, limit_sin)

    present_key = write_ring(past_key, local_key.to(key.dtype), past_length)
    present_value = write_ring(past_value, value, past_length)
    present_sink_key = write_sinks(past_sink_key, key, past_length, new_length)
    present_sink_value = write_sinks(past_sink_value, value, past_length, new_length)
    output = attend_caches(
        local_query,
        sink_query,
        present_key,
        present_value,
        present_sink_key,
        present_sink_value,
        query_position,
        slot_position,
        alibi_slopes,
        sink_logits,
        num_sink_tokens=num_sink_tokens,
        window_size=window_size,
        distance_limit=distance_limit,
        scale=scale,
        softcap=softcap,
    )
    return output.to(query.dtype), present_key, present_value, present_sink_key, present_sink_value


def attend_caches(
    local_query: Tensor,
    sink_query: Tensor,
    ring_key: Tensor,
    ring_value: Tensor,
    sink_key: Tensor,
    sink_value: Tensor,
    query_position: Tensor,
    slot_position: Tensor,
    alibi_slopes: Tensor,
    sink_logits: Tensor,
    *,
    num_sink_tokens: int,
    window_size: int,
    distance_limit: int,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Attend over [sinks | ring], masking by position; nothing is written.

    Args:
        local_query: (B, H, S, D) float32 or float64, rotated at their positions.
        sink_query: like local_query, rotated at the distance limit.
        ring_key: (B, G, C, D), rotated at their positions.
        ring_value: (B, G, C, D).
        sink_key: (B, G, max(N, 1), D), not rotated.
        sink_value: like sink_key.

    The other arguments are those of `lambda_attention`.

    Returns:
        (B, H, S, D) in the type of local_query.
    """
    real = local_query.dtype
    ring_distance = query_position[:, :, None] - slot_position[:, None, :]
    ring_seen = is_local(ring_distance, window_size) & (slot_position >= 0)[:, None, :]
    sink_position = torch.arange(sink_key.shape[2], device=local_query.device)
    sink_distance = query_position[:, :, None] - sink_position
    sink_seen = is_sink(sink_distance, sink_position, window_size, num_sink_tokens)

    groups = local_query.shape[1] // ring_key.shape[1]
    keys = [_heads(x, groups).to(real) for x in (sink_key, ring_key)]
    values = [_heads(x, groups).to(real) for x in (sink_value, ring_value)]
    sink_part = sink_query @ keys[0].transpose(-1, -2)
    ring_part = local_query @ keys[1].transpose(-1, -2)
    slopes = alibi_slopes.to(real)[:, None, None]
    logits = torch.cat(
        (
            _cap(sink_part * scale, softcap) - slopes * distance_limit,
            _cap(ring_part * scale, softcap) - slopes * ring_distance[:, None].to(real),
        ),
        dim=-1,
    )
    seen = torch.cat((sink_seen, ring_seen), dim=-1)[:, None]
    weights = _softmax(logits.masked_fill(~seen, float("-inf")), sink_logits)
    split = sink_key.shape[2]
    return weights[..., :split] @ values[0] + weights[..., split:] @ values[1]


def turned(x: Tensor, cos: Tensor, sin: Tensor, *, rotary_dim: int, interleaved: bool) -> Tensor:
    """(B, ·, S, D) in float32 or float64, rotated by rows (B, S, R/2) or one row (R/2,)."""
    real = real_type(x)
    if not rotary_dim:
        return x.to(real)
    rows = (row[..., None, :, :] if row.dim() == 3 else row for row in (cos, sin))
    return rotate(x.to(real), *(row.to(real) for row in rows), interleaved=interleaved)


def real_type(x: Tensor) -> torch.dtype:
    """Return what is computed in: float64 for float64, float32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rotate_at(
    x: Tensor, position: Tensor, inv_freq: Tensor, factor: float, interleaved: bool
) -> Tensor:
    angle = position[:, None, :, None].to(torch.float64) * inv_freq.to(torch.float64)
    cos, sin = (angle.cos() * factor).to(x.dtype), (angle.sin() * factor).to(x.dtype)
    return rotate(x, cos, sin, interleaved=interleaved)


def _rotate_at_any(
    x: Tensor, position: Tensor, inv_freq: Tensor, factor: float, interleaved: bool
) -> Tensor:
    """Rotate at positions of up to 40 bits: one rotation for each half, both angles exact."""
    low = torch.remainder(position, _ONE_ROTATION)
    x = _rotate_at(x, low, inv_freq, factor, interleaved)
    return _rotate_at(x, position - low, inv_freq, 1.0, interleaved)


def _heads(x: Tensor, groups: int) -> Tensor:
    return x.repeat_interleave(groups, dim=1)


def _cap(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _softmax(logits: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Softmax over keys and an optional learned logit; rows that see nothing become zeros."""
    real = real_type(logits)
    logits = logits.to(real)
    top = logits.amax(dim=-1, keepdim=True)
    if sink_logits is not None:
        extra = sink_logits.to(real)[:, None, None].expand(top.shape)
        top = torch.maximum(top, extra)
    top = top.masked_fill(top.isinf(), 0.0)
    weights = torch.exp(logits - top)
    total = weights.sum(dim=-1, keepdim=True)
    if sink_logits is not None:
        total = total + torch.exp(extra - top)
    return weights / total.clamp_min(torch.finfo(real).tiny)
