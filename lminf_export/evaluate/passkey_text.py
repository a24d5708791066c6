"""The passkey task's text: a key somewhere in a filler, and the question for it at the end.

The wording is the task's usual one (Mohtashami and Jaggi 2023, arXiv 2305.16300, figure 8; used
by LM-Infinite, arXiv 2308.16137, section 4.3), so that numbers are comparable.
"""

from __future__ import annotations

from dataclasses import dataclass

HEADER = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Passkey:
    """One instance: everything up to the question, and the key that answers it."""

    prompt: str
    key: str

    @property
    def answer(self) -> str:
        """The right continuation of the prompt: a space and the key."""
        return f" {self.key}"


def compose(key: str, fillers_before: int, fillers_after: int, header: bool = True) -> Passkey:
    """Return the task with the given numbers of filler sentences before and after the key's."""
    sentences = [
        *([HEADER] if header else []),
        *_fillers(0, fillers_before),
        NEEDLE.format(key=key),
        *_fillers(fillers_before, fillers_after),
        QUESTION,
    ]
    return Passkey(prompt=" ".join(sentences), key=key)


def _fillers(start: int, count: int) -> list[str]:
    """The filler's sentences in their order, continued from ``start``."""
    return [FILLER[(start + offset) % len(FILLER)] for offset in range(count)]
