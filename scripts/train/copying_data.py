"""Training data for copying: repeated sequences, and passkeys far and near."""

from __future__ import annotations

import random

import torch

from scripts.train.training_data import VOCAB_SIZE, Batches, passkey_sequence, whole

# Steps in which most rows are there to be copied, then the decay, in which most are text.
DENSE_STEPS = 900
DECAY_STEPS = 2000
# Shares of rows that repeat and that hold passkeys; the rest is text.
DENSE_SHARES = (0.40, 0.35)
DECAY_SHARES = (0.08, 0.12)
PERIODS = (6, 64)
# Filler sentences on either side of a key, exclusive: near keys are learned first.
FILLERS = (1, 4, 26)


class CopyingBatches(Batches):
    """Rows to be copied, and crops of the corpora; the number of either changes once."""

    def row(self, step: int, length: int, dice: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one row's ids and their weights."""
        repeated, passkeys = DENSE_SHARES if step < DENSE_STEPS else DECAY_SHARES
        chance = dice.random()
        if chance < repeated:
            return self._repeated(length, dice)
        if chance < repeated + passkeys:
            limit = dice.choice(FILLERS)
            ids = passkey_sequence(self._tokenizer, length, dice, (limit, limit))
            return whole(torch.tensor(ids))
        return whole(self.crop(length, dice))

    def _repeated(self, length: int, dice: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """A short piece, of text or of random ids, over and over; the first time counts nothing."""
        period = dice.randrange(*PERIODS)
        if dice.random() < 0.5:
            piece = self.crop(period, dice)
        else:
            piece = torch.tensor([dice.randrange(1, VOCAB_SIZE) for _ in range(period)])
        ids = piece.repeat(length // period + 1)[:length]
        return ids, (torch.arange(length) >= period).float()
