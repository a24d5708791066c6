"""Two public-domain corpora out of Debian's packages, cut into training and held-out text.

Run this file to write the texts to a folder:

    python -m scripts.train.corpora build/corpora
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.debian_books import fetch_novels, join_paragraphs, unpacked

# The program's abbreviations, and the names the chapter headings show.
BOOKS = dict(
    re.findall(
        r"(\w+)=([\w ]+)",
        "Ge=Genesis,Exo=Exodus,Lev=Leviticus,Num=Numbers,Deu=Deuteronomy,Josh=Joshua,Jdgs=Judges,"
        "Ruth=Ruth,1Sm=1 Samuel,2Sm=2 Samuel,1Ki=1 Kings,2Ki=2 Kings,1Chr=1 Chronicles,"
        "2Chr=2 Chronicles,Ezra=Ezra,Neh=Nehemiah,Est=Esther,Job=Job,Psa=Psalm,Prv=Proverbs,"
        "Eccl=Ecclesiastes,SSol=Song of Solomon,Isa=Isaiah,Jer=Jeremiah,Lam=Lamentations,"
        "Eze=Ezekiel,Dan=Daniel,Hos=Hosea,Joel=Joel,Amos=Amos,Obad=Obadiah,Jonah=Jonah,Mic=Micah,"
        "Nahum=Nahum,Hab=Habakkuk,Zep=Zephaniah,Hag=Haggai,Zec=Zechariah,Mal=Malachi,Mat=Matthew,"
        "Mark=Mark,Luke=Luke,John=John,Acts=Acts,Rom=Romans,1Cor=1 Corinthians,2Cor=2 Corinthians,"
        "Gal=Galatians,Eph=Ephesians,Phi=Philippians,Col=Colossians,1Th=1 Thessalonians,"
        "2Th=2 Thessalonians,1Tim=1 Timothy,2Tim=2 Timothy,Titus=Titus,Phmn=Philemon,Heb=Hebrews,"
        "Jas=James,1Pet=1 Peter,2Pet=2 Peter,1Jn=1 John,2Jn=2 John,3Jn=3 John,Jude=Jude,"
        "Rev=Revelation",
    )
)

# Neighbouring books without a near-verbatim parallel elsewhere: of all contiguous ranges of
# 240 to 400 KB this one shares the fewest 12-word runs with the other books (0.1 % of its
# words). Kings and Chronicles, the gospels, Isaiah or the Psalms would leak whole chapters.
HELDOUT_BOOKS = ("Lamentations", "Ezekiel", "Daniel")

# The last one written.
HELDOUT_NOVEL = "Persuasion"


@dataclass(frozen=True)
class Corpus:
    """A text to train on, and a part of it that no training sees."""

    name: str
    train: str
    heldout: str


def fetch_corpora() -> list[Corpus]:
    """Return the King James Bible and Jane Austen's novels."""
    return [
        Corpus("kjv", *split_bible(fetch_bible())),
        Corpus("austen", *split_novels(fetch_novels())),
    ]


def fetch_bible() -> str:
    """Return the whole text, one verse per line with its reference."""
    with unpacked("bible-kjv", "bible-kjv-text") as folder:
        # The program looks for bible.data in the current folder first; -f means one verse a line.
        printed = subprocess.run(
            [f"{folder}/usr/bin/bible", "-f", "gen1:1-rev22:21"],
            cwd=f"{folder}/usr/lib",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
    return printed.stdout


def split_bible(verses: str) -> tuple[str, str]:
    """Return (training text, held-out text) from lines such as ``Ge1:1 In the beginning``.

    A chapter is its heading and one line per verse. Verse numbers go: they are a counter,
    which costs tokens and reads badly.
    """
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in verses.splitlines():
        match = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+ (.+)", line)
        if match is None or match[1] not in BOOKS:
            raise SystemExit(f"expected a verse such as 'Ge1:1 In the beginning', found {line!r}")
        chapters.setdefault((BOOKS[match[1]], match[2]), []).append(match[3].strip())
    parts: dict[bool, list[str]] = {True: [], False: []}
    for (book, number), lines in chapters.items():
        parts[book in HELDOUT_BOOKS].append("\n".join([f"{book} {number}\n", *lines, "\n"]))
    return "".join(parts[False]), "".join(parts[True])


def split_novels(novels: dict[str, list[str]]) -> tuple[str, str]:
    """Return (training text, held-out text), one paragraph a line."""
    texts = {title: join_paragraphs(lines) for title, lines in novels.items()}
    train = "".join(text for title, text in texts.items() if title != HELDOUT_NOVEL)
    return train, texts[HELDOUT_NOVEL]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for corpus in fetch_corpora():
        for part, text in (("train", corpus.train), ("heldout", corpus.heldout)):
            (folder / f"{corpus.name}-{part}.txt").write_text(text)
            print(f"{corpus.name}-{part}.txt: {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
