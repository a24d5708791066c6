"""The streams kernels are checked with: every feature, odd sizes, several laps, far positions."""

from __future__ import annotations

import torch

from benchmarks.support.operator_case import Case
from scripts.gpu.check import Stream
from scripts.gpu.kernel_library import SUPPORTED_HEAD_DIMS

BASES = (0, 10**6, 2 * 10**8, 10**12)
# Rows that cross 2·10⁸ after a few tokens, and one that is far from it.
CROSSING = (2 * 10**8 - 9, 2 * 10**8 - 31, 31)
# From 2³¹ on positions are divided in another way.
CROSSING_2_31 = (2**31 - 9, 2**31 - 31, 2**32 - 9)
HALF_TYPES = (torch.float16, torch.bfloat16)
HOPPER_HEAD_DIMS = (64, 128)
TALL_HEAD_DIMS = (32, 64, 80, 96, 128)

SMALL = Case(window_size=37, num_sink_tokens=5, chunk_size=7, head_dim=64, rotary_dim=64)
FEATURES = {
    "half_rotation": SMALL,
    "interleaved": SMALL.with_(interleaved=True),
    "partial_rotation": SMALL.with_(rotary_dim=20),
    "partial_interleaved": SMALL.with_(rotary_dim=22, interleaved=True),
    "no_rotation": SMALL.with_(rotary_dim=0),
    "alibi": SMALL.with_(rotary_dim=0, alibi=True),
    "rotation_and_alibi": SMALL.with_(alibi=True, distance_limit=41),
    "softcap": SMALL.with_(softcap=2.5),
    "learned_sink_logits": SMALL.with_(sink_logits=True),
    "no_sinks": SMALL.with_(num_sink_tokens=0),
    "far_limit": SMALL.with_(distance_limit=97),
    "attention_factor": SMALL.with_(attention_factor=1.3),
    "more_sinks_than_window": SMALL.with_(num_sink_tokens=53, window_size=11),
    "window_of_one": SMALL.with_(window_size=1),
    "everything": SMALL.with_(
        softcap=3.0, sink_logits=True, alibi=True, distance_limit=51, rotary_dim=24
    ),
    "narrow_partial_rotation": SMALL.with_(head_dim=32, rotary_dim=20),
    "narrow_interleaved": SMALL.with_(head_dim=32, rotary_dim=22, interleaved=True),
    "narrow_alibi": SMALL.with_(head_dim=32, rotary_dim=0, alibi=True),
    "narrow_everything": SMALL.with_(
        head_dim=32, softcap=3.0, sink_logits=True, alibi=True, distance_limit=51, rotary_dim=24
    ),
}
HEADS = ((3, 3), (4, 2), (7, 1), (8, 1), (16, 2), (12, 1), (20, 1), (71, 1))
STEPS = ((1, 1, 1, 1), (7, 3, 0, 7), (1, 0, 1, 1), (1, 1, 1, 0), (5, 7, 1, 2), (1, 1, 1, 1))


def feature_streams(dtype: torch.dtype) -> list[Stream]:
    """Every feature, single tokens and ragged chunks at near and far positions."""
    return [
        Stream(f"{name}-{_name(dtype)}", case, BASES, STEPS, dtype, in_place=index % 2 == 0)
        for index, (name, case) in enumerate(FEATURES.items())
    ]


def shape_streams(dtype: torch.dtype) -> list[Stream]:
    """Every head dimension with every ratio of heads, decode and chunks."""
    streams = []
    for index, head_dim in enumerate(SUPPORTED_HEAD_DIMS):
        for offset, (heads, kv_heads) in enumerate(HEADS):
            case = SMALL.with_(
                head_dim=head_dim,
                rotary_dim=head_dim,
                num_heads=heads,
                num_kv_heads=kv_heads,
                window_size=53 + index,
                interleaved=bool((index + offset) % 2),
            )
            name = f"dim{head_dim}-heads{heads}_{kv_heads}-{_name(dtype)}"
            chunks = ((1, 1), (7, 4), (1, 1), (0, 1), (3, 2))
            bases = (10**6 + 3, 0)
            streams.append(Stream(name, case, bases, chunks, dtype, in_place=offset % 2 == 0))
    return streams


def some_shape_streams(dtype: torch.dtype, step: int) -> list[Stream]:
    """Every ratio of heads with those of 32, one shape in `step` with the others."""
    found = shape_streams(dtype)
    return [*found[: len(HEADS)], *found[len(HEADS) :: step]]


def lap_streams(dtype: torch.dtype) -> list[Stream]:
    """A ring that goes round several times from 0, across 2·10⁸ and across 2³¹, ragged."""
    case = SMALL.with_(window_size=11, chunk_size=5, num_heads=4)
    chunks = tuple((1 + i % 5, (i * 3) % 6 % 5, 1) for i in range(24))
    return [
        Stream(f"laps-{_name(dtype)}", case, (0, 0, 0), chunks, dtype),
        Stream(f"across_200_million-{_name(dtype)}", case, CROSSING, chunks, dtype),
        Stream(f"across_2_to_the_31-{_name(dtype)}", case, CROSSING_2_31, chunks, dtype),
    ]


def long_streams(dtype: torch.dtype) -> list[Stream]:
    """Windows long enough that keys are split, and chunks of several tiles."""
    decode = SMALL.with_(
        window_size=1511,
        num_sink_tokens=19,
        chunk_size=3,
        num_heads=4,
        head_dim=128,
        rotary_dim=128,
    )
    chunk = SMALL.with_(
        window_size=211,
        chunk_size=149,
        num_sink_tokens=67,
        num_heads=3,
        num_kv_heads=1,
        head_dim=96,
        rotary_dim=96,
    )
    wide = chunk.with_(head_dim=256, rotary_dim=256, num_heads=1, chunk_size=83)
    many = decode.with_(num_heads=71, num_kv_heads=1, head_dim=64, rotary_dim=64)
    narrow = decode.with_(num_heads=24, head_dim=32, rotary_dim=32)
    ones = ((1, 1), (1, 1), (0, 1), (3, 1))
    return [
        Stream(f"long_decode-{_name(dtype)}", decode, (10**9, 700), ones, dtype),
        Stream(
            f"long_decode_16_rows-{_name(dtype)}",
            decode.with_(num_heads=24),
            (10**9, 5),
            ones,
            dtype,
        ),
        Stream(f"long_decode_71_heads-{_name(dtype)}", many, (10**9, 5), ones[:2], dtype),
        Stream(
            f"long_decode_no_workspace-{_name(dtype)}",
            decode,
            (10**9, 700),
            ones,
            dtype,
            with_workspace=False,
        ),
        Stream(f"long_decode_dim32-{_name(dtype)}", narrow, (10**9, 700), ones, dtype),
        Stream(
            f"long_decode_dim32_no_workspace-{_name(dtype)}",
            narrow.with_(num_heads=6),
            (10**9, 700),
            ones,
            dtype,
            with_workspace=False,
        ),
        Stream(
            f"chunks-{_name(dtype)}",
            chunk,
            (0, 10**6),
            ((149, 149), (101, 149), (149, 7)),
            dtype,
            in_place=False,
        ),
        Stream(
            f"chunks_dim32-{_name(dtype)}",
            chunk.with_(head_dim=32, rotary_dim=32),
            (0, 10**6),
            ((149, 149), (101, 149), (17, 7)),
            dtype,
        ),
        Stream(f"chunks_dim256-{_name(dtype)}", wide, (400, 31), ((83, 41), (1, 83)), dtype),
    ]


def tile_streams(dtype: torch.dtype, head_dims: tuple[int, ...] = HOPPER_HEAD_DIMS) -> list[Stream]:
    """Chunks of many rows in some head dimensions: several tiles, laps, splits."""
    chunk = SMALL.with_(
        window_size=401, chunk_size=149, num_sink_tokens=139, num_heads=3, num_kv_heads=1
    )
    every = FEATURES["everything"].with_(
        distance_limit=257,
        window_size=211,
        chunk_size=83,
        num_sink_tokens=19,
        num_heads=4,
        num_kv_heads=2,
    )
    few = chunk.with_(num_heads=1, chunk_size=67, window_size=1511, num_sink_tokens=5)
    cases = {
        "tiles": (chunk, (0, 10**6), ((149, 149), (101, 149), (149, 7), (149, 149)), True),
        "tiles_everything": (every, (3, 10**12), ((83, 41), (1, 83), (83, 83)), True),
        "tiles_interleaved": (chunk.with_(interleaved=True), (700,), ((149,), (77,)), True),
        "tiles_split": (few, (10**9,), ((67,), (65,)), True),
        "tiles_not_split": (few, (10**9,), ((67,),), False),
    }
    return [
        Stream(
            f"{name}-dim{head_dim}-{_name(dtype)}",
            case.with_(
                head_dim=head_dim, rotary_dim=head_dim if case.rotary_dim == 64 else case.rotary_dim
            ),
            bases,
            chunks,
            dtype,
            in_place=head_dim == 64,
            with_workspace=workspace,
        )
        for head_dim in head_dims
        for name, (case, bases, chunks, workspace) in cases.items()
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
