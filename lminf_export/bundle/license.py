"""The licence that a model names in its own card; nothing else of the card is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Files that go with a model wherever its weights go.
LICENSE_FILE = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)([._-].*)?", re.IGNORECASE)
MAX_FILE_BYTES = 2**20

_MAX_HEAD = 2**16
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_LINE = re.compile(r"(license|license_name|license_link):[ \t]+(.+)")


@dataclass(frozen=True)
class License:
    """A licence as the front matter of a card names it.

    Attributes:
        identifier: such as "apache-2.0", or "other".
        name: of a licence without an identifier of its own.
        link: to its text.
    """

    identifier: str
    name: str | None = None
    link: str | None = None

    @property
    def title(self) -> str:
        """How people call it."""
        return self.name or self.identifier


def read_license(card: Path) -> License | None:
    """Return the licence that a card's front matter names, None if it names none.

    Args:
        card: `README.md` of a model; it may be missing, or anything at all.
    """
    try:
        with open(card, "rb") as file:
            text = file.read(_MAX_HEAD).decode("utf-8", "replace")
    except OSError:
        return None
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return None
    found = {}
    for line in lines[1:]:
        if line.rstrip() == "---":
            break
        if match := _LINE.fullmatch(line.rstrip()):
            found[match[1]] = match[2].strip().strip("'\"")[:200]
    else:
        return None
    identifier = found.get("license", "")
    if not _IDENTIFIER.fullmatch(identifier):
        return None
    return License(identifier, found.get("license_name"), found.get("license_link"))
