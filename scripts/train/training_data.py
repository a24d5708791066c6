"""Training data of the demo models: the tokenizer, crops of the corpora, and the passkey task."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lminf_export.evaluate import passkey_text

VOCAB_SIZE = 4096
BOS = "<|bos|>"
# The shape of a play: tests of chats need a template, the model has learnt none.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}:{{ '\\n' }}{{ message['content'] | trim }}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{{ '\\n' }}{% endif %}"
)
CONTEXT = 256
BATCH_SIZE = 8
PASSKEY_SHARE = 1 / 12
TEMPLATE_REPEATS = 300


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer with single digits and the start token put first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The passkey task's few words would be split into bytes without some weight of their own.
    template = passkey_text.compose("0", len(passkey_text.FILLER), 0).prompt
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    tokenizer.train_from_iterator(lines + [template] * TEMPLATE_REPEATS, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Return the ids of a text without the start token, shape (tokens,), int64."""
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)


def with_bos(crops: torch.Tensor) -> torch.Tensor:
    """Prefix each row of ids, shape (B, S), with the start token."""
    return F.pad(crops, (1, 0), value=0)


def contiguous_windows(ids: torch.Tensor, length: int, limit: int | None = None) -> torch.Tensor:
    """Cut ids into neighbouring sequences of ``length``, start token included: (B, length)."""
    count = len(ids) // (length - 1)
    rows = ids[: count * (length - 1)].view(count, length - 1)
    return with_bos(rows[:limit])


def windows_of(ids: torch.Tensor, start: bool, limit: int | None = None) -> torch.Tensor:
    """Cut held-out ids into the sequences the model was trained on."""
    if start:
        return contiguous_windows(ids, CONTEXT, limit)
    return ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:limit]


def passkey_sequence(
    tokenizer: Tokenizer, length: int, dice: random.Random, fillers: tuple[int, int] = (20, 25)
) -> list[int]:
    """Return ``length`` ids of the task, answer included, the last of them cut off.

    Several short instances or one that fills the sequence; where an instance would be longer,
    its beginning is cut away, so that questions without their header occur too. ``fillers`` are
    the numbers of filler sentences before and after the key, exclusive.
    """
    ids: list[int] = []
    while len(ids) < length:
        before, after = (dice.randrange(limit) for limit in fillers)
        key = f"{dice.randrange(10**5):05d}"
        task = passkey_text.compose(key, before, after, header=dice.random() < 0.7)
        text = task.prompt + task.answer + ".\n"
        ids += tokenizer.encode(text, add_special_tokens=False).ids[-length:]
    return ids[:length]


class Batches:
    """The training data: batch number n is the same in every run with the same seed."""

    def __init__(self, ids: torch.Tensor, tokenizer: Tokenizer, seed: int, start: bool) -> None:
        self._ids, self._tokenizer, self._seed, self._start = ids, tokenizer, seed, start

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and what each counts as a target, both (BATCH_SIZE, CONTEXT)."""
        dice = random.Random(f"{self._seed}/{step}")
        length = CONTEXT - 1 if self._start else CONTEXT
        rows = [self.row(step, length, dice) for _ in range(BATCH_SIZE)]
        ids, weights = (torch.stack(part) for part in zip(*rows, strict=True))
        return (with_bos(ids), with_bos(weights)) if self._start else (ids, weights)

    def row(self, step: int, length: int, dice: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one row's ids and their weights: mostly text, sometimes the passkey task."""
        if dice.random() < PASSKEY_SHARE:
            return whole(torch.tensor(passkey_sequence(self._tokenizer, length, dice)))
        return whole(self.crop(length, dice))

    def crop(self, length: int, dice: random.Random) -> torch.Tensor:
        """Return a random run of `length` neighbouring ids."""
        start = dice.randrange(len(self._ids) - length + 1)
        return self._ids[start : start + length]


def whole(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count every id."""
    return ids, torch.ones(len(ids))
