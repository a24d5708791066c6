"""The lookup task's text: records of names and codes, and the question for one of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

COLOURS = (
    *("amber", "black", "blue", "brown", "coral", "green", "grey", "indigo", "ivory", "orange"),
    *("pink", "purple", "red", "silver", "violet", "white", "yellow"),
)
ANIMALS = (
    *("badger", "bear", "beaver", "camel", "crane", "deer", "dolphin", "eagle", "falcon", "fox"),
    *("goat", "heron", "horse", "lion", "lizard", "otter", "owl", "rabbit", "raven", "salmon"),
    *("seal", "sheep", "swan", "tiger", "turtle", "whale", "wolf", "zebra"),
)
NUMBERS = 1000
NAMES = len(COLOURS) * len(ANIMALS) * NUMBERS
CODE_DIGITS = 5
HEADER = "Here is a list of names and their codes. I will ask for one of the codes at the end."
RECORD = "The code of {name} is {code}."
QUESTION = "What is the code of {name}? The code of {name} is"


@dataclass(frozen=True)
class Lookup:
    """One instance: everything up to the question, the record asked for and all codes."""

    prompt: str
    name: str
    code: str
    others: tuple[str, ...]

    @property
    def record(self) -> str:
        """The sentence in the text that holds the answer."""
        return RECORD.format(name=self.name, code=self.code)


def name_of(number: int) -> str:
    """Return one of NAMES names."""
    rest, serial = divmod(number, NUMBERS)
    colour, animal = divmod(rest, len(ANIMALS))
    return f"{COLOURS[colour]} {ANIMALS[animal]} {serial}"


def compose(records: int, depth: float, seed: str) -> Lookup:
    """Return a text of so many records, one of which is asked for.

    Args:
        records: at least 1.
        depth: of the record asked for, 0 (the first) … 1 (the last).
        seed: of names and codes.
    """
    dice = random.Random(seed)
    names = [name_of(number) for number in dice.sample(range(NAMES), records)]
    codes = [f"{code:0{CODE_DIGITS}d}" for code in dice.sample(range(10**CODE_DIGITS), records)]
    asked = round(depth * (records - 1))
    lines = [RECORD.format(name=n, code=c) for n, c in zip(names, codes, strict=True)]
    prompt = " ".join([HEADER, *lines, QUESTION.format(name=names[asked])])
    others = tuple(code for index, code in enumerate(codes) if index != asked)
    return Lookup(prompt, names[asked], codes[asked], others)
