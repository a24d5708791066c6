"""Arguments that nobody means: odd numbers, token ids, texts, paths and objects, from a seed."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


def _itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


class _NoLength:
    def __iter__(self) -> Iterable[int]:
        return iter((1, 2))


class _Index:
    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


# Each is made anew: a generator is used up by the first who reads it.
NUMBERS: tuple[Callable[[], Any], ...] = (
    *(
        lambda value=value: value
        for value in (
            10**400,
            -(10**400),
            10**5000,
            2**31,
            2**63 - 1,
            2**63,
            2**64,
            2**128,
            -1,
            -(2**63),
            0,
            1,
            2,
            -0.0,
            0.5,
            1.0,
            2.5,
            5e-324,
            1e-300,
            1e-38,
            1e38,
            1e300,
            math.nan,
            math.inf,
            -math.inf,
            Fraction(1, 3),
            Fraction(10**400, 3),
            Fraction(1, 10**400),
            Decimal("0.5"),
            Decimal("NaN"),
            Decimal("1e999"),
            np.float16(0.5),
            np.float32(0.5),
            np.float64("nan"),
            np.longdouble("1e4000"),
            np.int8(-1),
            np.int64(3),
            np.uint64(2**64 - 1),
            np.bool_(True),
            np.complex64(1),
            np.datetime64("2020-01-01"),
            np.timedelta64(3),
            1j,
            True,
            False,
            None,
            "1",
            "",
            b"1",
            "nan",
        )
    ),
    lambda: np.array(3),
    lambda: np.array(0.5),
    lambda: np.array([1]),
    lambda: np.array([0.5, 1]),
    lambda: np.array("x"),
    lambda: np.array(None),
    lambda: _Index(3),
    lambda: _Index(10**30),
)
IDS: tuple[Callable[[], Any], ...] = (
    list,
    tuple,
    set,
    dict,
    lambda: [1, 2, 3],
    lambda: (1,),
    lambda: [[1, 2], [3, 4]],
    lambda: [[1, 2], [3]],
    lambda: [[]],
    lambda: [[[1]]],
    lambda: [1.0, 2.0],
    lambda: [1, None],
    lambda: [1, "2"],
    lambda: ["a", "b"],
    lambda: [True, False],
    lambda: [-1],
    lambda: [256, 257],
    lambda: [10**400],
    lambda: [2**63],
    lambda: [2**63, -1],
    lambda: [2**64 - 1, 3],
    lambda: [math.nan],
    lambda: [Fraction(1), Decimal(2)],
    lambda: [_Index(3)],
    lambda: [object()],
    lambda: {1: 2},
    lambda: {1, 2},
    lambda: frozenset((3,)),
    lambda: range(5),
    lambda: range(10**18),
    lambda: deque([1, 2]),
    lambda: (token for token in (1, 2, 3)),
    lambda: (token for token in (1, "x")),
    lambda: itertools.count(),
    lambda: itertools.repeat(1),
    lambda: map(int, "123"),
    lambda: _itself(),
    lambda: _NoLength(),
    lambda: b"abc",
    lambda: bytearray(b"abc"),
    lambda: memoryview(b"abc"),
    lambda: np.arange(4),
    lambda: np.arange(4)[::-1],
    lambda: np.arange(4).reshape(1, 4),
    lambda: np.arange(4).reshape(4, 1),
    lambda: np.arange(4.0),
    lambda: np.arange(4, dtype=np.uint64),
    lambda: np.arange(4, dtype=np.uint8),
    lambda: np.arange(4, dtype=">i4"),
    lambda: np.array([2**64 - 1], np.uint64),
    lambda: np.array([-1], np.int8),
    lambda: np.array([1, None], object),
    lambda: np.array([1, 2], object),
    lambda: np.array([[1, 2]], object),
    lambda: np.array(["a"]),
    lambda: np.array([True]),
    lambda: np.array([1 + 1j]),
    lambda: np.array(["2020-01-01"], "M8[D]"),
    lambda: np.zeros((0,), np.int64),
    lambda: np.zeros((1, 0), np.int64),
    lambda: np.zeros((0, 1), np.int64),
    lambda: np.zeros((1, 1, 1), np.int64),
    lambda: np.zeros(2, [("a", "i4"), ("b", "f4")]),
    lambda: np.ma.masked_array([1, 2], [False, True]),
    lambda: np.broadcast_to(np.int64(1), (3,)),
)
TEXTS: tuple[Callable[[], Any], ...] = tuple(
    lambda value=value: value
    for value in (
        "",
        " ",
        "a",
        "\0",
        "\ud800",
        "a\udcffb",
        "\ufffd",
        "\U0010ffff",
        "é̂\n\r\t",
        "a" * 5000,
        "<eos>",
        b"bytes",
        Path("text"),
        ["a", "b"],
        ["a", 1],
        [""],
        ("a",),
        {"a": 1},
        {"a"},
        ["\ud800"],
        np.str_("a"),
        np.array(["a"]),
        ["a" * 3000],
    )
)
OBJECTS: tuple[Callable[[], Any], ...] = (
    object,
    lambda: object,
    lambda: len,
    lambda: print,
    lambda: lambda: None,
    lambda: ...,
    lambda: NotImplemented,
    lambda: np,
    lambda: slice(1, 2),
    lambda: ValueError("x"),
    lambda: np.zeros((2, 3), np.float32),
    lambda: np.full(5, np.nan, np.float32),
    lambda: np.random.default_rng(0),
    lambda: "all",
)
ANY = (*NUMBERS, *IDS, *TEXTS, *OBJECTS)


def odd(rng: np.random.Generator, *likely: tuple[Callable[[], Any], ...]) -> Any:
    """Return a value, mostly of the likely kinds."""
    kinds = [*likely, ANY] if likely else [ANY]
    kind = kinds[int(rng.integers(len(kinds)))]
    return kind[int(rng.integers(len(kind)))]()
