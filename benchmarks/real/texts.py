"""Running prose in the public domain, out of Debian's packages, with its provenance.

Each text is distinct and unbroken, one paragraph a line. A model trained on the web may have seen
any of them: they measure how methods compare on the same tokens, not how well a model reads.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support.debian_books import (
    fetch_novels,
    join_paragraphs,
    read_character_vectors,
    unpacked,
)

_GUTENBERG = re.compile(r"\*\*\* ?(START|END) OF TH(?:E|IS) PROJECT GUTENBERG[^\n]*")


@dataclass(frozen=True)
class Source:
    """A text and where it is from.

    Attributes:
        title: titles and author.
        package: Debian's, in which it lies.
        fetch: returns the text.
    """

    title: str
    package: str
    fetch: Callable[[], str]


def _austen() -> str:
    novels = fetch_novels()
    return "".join(join_paragraphs(novels[name]) for name in ("Persuasion", "Northanger Abbey"))


def _whale() -> str:
    with unpacked("r-cran-tokenizers") as folder:
        data = next(folder.glob("usr/lib/R/site-library/tokenizers/data/Rdata.rdb")).read_bytes()
    lines = next(iter(read_character_vectors(data)))
    return join_paragraphs(_inside("\n".join(lines)).splitlines())


def _inside(text: str) -> str:
    """Return an electronic book without the publisher's words around it."""
    marks = list(_GUTENBERG.finditer(text))
    begin = next((m.end() for m in marks if m[1] == "START"), 0)
    end = next((m.start() for m in marks if m[1] == "END"), len(text))
    return text[begin:end]


SOURCES = {
    "austen": Source(
        "Persuasion, then Northanger Abbey, by Jane Austen", "r-cran-janeaustenr", _austen
    ),
    "whale": Source("Moby Dick, by Herman Melville", "r-cran-tokenizers", _whale),
}


def path_of(name: str, work: Path) -> Path:
    """Return a text's file in the work folder, fetched unless it is there."""
    path = work / "texts" / f"{name}.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(SOURCES[name].fetch(), encoding="utf-8")
        fresh.replace(path)
    return path


def described(name: str, work: Path) -> dict[str, Any]:
    """Return what a result says about a text."""
    source, raw = SOURCES[name], path_of(name, work).read_bytes()
    return {
        "title": source.title,
        "debian_package": source.package,
        "package_version": _version(source.package),
        "bytes": len(raw),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }


def _version(package: str) -> str:
    shown = subprocess.run(
        ["apt-cache", "policy", package], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"Candidate: (\S+)", shown)
    return match[1] if match else "unknown"
