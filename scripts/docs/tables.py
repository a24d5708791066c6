"""Tables of the documentation, written from the JSON in benchmarks/results.

A page marks where a table goes: `<!-- table: KIND ARGUMENT … -->` up to `<!-- end -->`. Its module
names a function for each kind, which gets the arguments and returns the Markdown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
NOT_MEASURED = "*Not measured yet.*"
MIB, GIB = 2**20, 2**30
_MARKED = re.compile(r"<!-- table: (.*?) -->.*?<!-- end -->", re.DOTALL)


class NotMeasuredError(Exception):
    """A table has no result yet; the page says so in its place."""


def load(name: str) -> dict[str, Any]:
    """Read benchmarks/results/NAME.json.

    Raises:
        NotMeasuredError: there is no such file.
    """
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise NotMeasuredError(name)
    return json.loads(path.read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """Return a Markdown table; columns of numbers, all but the first, are aligned to the right."""
    align = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, align, *rows))


def filled(text: str, kinds: Mapping[str, Callable[..., str]]) -> str:
    """Return a page with every marked table replaced."""

    def made(match: re.Match[str]) -> str:
        kind, *arguments = match[1].split()
        try:
            content = kinds[kind](*arguments)
        except NotMeasuredError:
            content = NOT_MEASURED
        return f"<!-- table: {match[1]} -->\n\n{content}\n\n<!-- end -->"

    return _MARKED.sub(made, text)


def page(name: str, kinds: Mapping[str, Callable[..., str]]) -> str:
    """Return docs/NAME as its results make it."""
    return filled((DOCS / name).read_text(encoding="utf-8"), kinds)
