"""Public-domain books out of Debian's packages.

Packages are downloaded with ``apt-get download`` and unpacked with ``dpkg-deb``; nothing is
installed and no rights are needed.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The novels lie in the package in this order.
NOVELS = (
    "Emma",
    "Mansfield Park",
    "Northanger Abbey",
    "Persuasion",
    "Pride and Prejudice",
    "Sense and Sensibility",
)


@contextmanager
def unpacked(*packages: str) -> Iterator[Path]:
    """Download Debian packages and unpack them into a folder that lasts as long as the block."""
    with tempfile.TemporaryDirectory() as folder:
        # apt drops its privileges to download, so the folder has to be open to others.
        os.chmod(folder, 0o755)
        subprocess.run(["apt-get", "download", *packages], cwd=folder, check=True)
        for package in sorted(Path(folder).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        yield Path(folder)


def fetch_novels() -> dict[str, list[str]]:
    """Return Jane Austen's six novels by title, each as the lines of its printed text."""
    with unpacked("r-cran-janeaustenr") as folder:
        data = next(folder.glob("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")).read_bytes()
    novels = list(read_character_vectors(data))
    for title, lines in zip(NOVELS, novels, strict=True):
        if title.upper() != lines[0].upper():
            raise SystemExit(f"expected the novel {title!r}, found {lines[0]!r}")
    return dict(zip(NOVELS, novels, strict=True))


def join_paragraphs(lines: list[str]) -> str:
    """Undo the typesetting: a paragraph becomes one line."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(line.rstrip() for line in lines))
    joined = (re.sub(r"\s*\n\s*", " ", paragraph).strip() for paragraph in paragraphs)
    return "\n".join(paragraph for paragraph in joined if paragraph) + "\n\n"


def read_character_vectors(data: bytes) -> Iterator[list[str]]:
    """Yield the character vectors in an R lazy-load database, in the order they lie in it.

    Each is a zlib stream behind its length, and in it an object in R's serialisation format,
    version 3, XDR (R Internals, section 1.8).
    """
    while data:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(data[4:])
        data = inflater.unused_data
        (encoding_length,) = struct.unpack_from(">i", raw, 14)
        offset = 18 + encoding_length
        kind, count = struct.unpack_from(">2i", raw, offset)
        if raw[:2] != b"X\n" or kind & 0xFF != 16:
            raise SystemExit(f"expected a character vector, found R type {kind & 0xFF}")
        offset += 8
        strings = []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", raw, offset + 4)
            offset += 8
            strings.append(raw[offset : offset + length].decode())
            offset += length
        yield strings
