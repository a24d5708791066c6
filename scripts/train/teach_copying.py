"""Go on training a demo model until it copies, as the passkey task of docs/evidence.md asks for.

    python -m scripts.train.train_demo_models llama --out build/llama
    python -m scripts.train.teach_copying build/llama --out examples/demo-llama

A model as small as these does not learn to copy from a few million tokens of text. So it first
reads mostly sequences that repeat (the text suffers), then mostly text again while the learning
rate falls. A run that is interrupted goes on from its last checkpoint when started again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from benchmarks.support.demo_models import HELDOUT_FILES
from scripts.train.copying_data import (
    DECAY_SHARES,
    DECAY_STEPS,
    DENSE_SHARES,
    DENSE_STEPS,
    CopyingBatches,
)
from scripts.train.corpora import fetch_corpora
from scripts.train.training_data import BATCH_SIZE, CONTEXT, encode, windows_of
from scripts.train.training_loop import Schedule, add_options, finish, prepare, save_model, train
from scripts.train.training_record import describe_heldout, describe_machine

SCHEDULE = Schedule(steps=DENSE_STEPS + DECAY_STEPS, peak=2e-3, warmup=50, decay=DECAY_STEPS)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
KEPT_FILES = (*TOKENIZER_FILES, *HELDOUT_FILES.values())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder that train_demo_models.py wrote")
    add_options(parser, seed=1)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    before = json.loads((args.source / "training.json").read_text(encoding="utf-8"))
    if not before["start_token_in_training"]:
        raise SystemExit(f"{args.source} was trained without a start token; copying needs one here")
    prepare(args)
    for name in KEPT_FILES:
        if not (args.out / name).exists():
            shutil.copy(args.source / name, args.out / name)
    corpora = fetch_corpora()
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    train_ids = torch.cat([encode(tokenizer, corpus.train) for corpus in corpora])
    probes = {c.name: windows_of(encode(tokenizer, c.heldout), True, limit=32) for c in corpora}
    model = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32)
    batches = CopyingBatches(train_ids, tokenizer, args.seed, start=True)
    seconds = train(model, batches, probes, SCHEDULE, args.out)
    save_model(model, args.out)
    saved = type(model).from_pretrained(args.out, dtype=torch.float32).eval()
    record = {
        **before,
        "heldout": describe_heldout(saved, tokenizer, corpora, start=True),
        "copying": {
            **describe_machine(),
            "seed": args.seed,
            "tokens_seen": SCHEDULE.steps * BATCH_SIZE * CONTEXT,
            "steps": [DENSE_STEPS, DECAY_STEPS],
            "shares_of_repeated_and_passkey_rows": [DENSE_SHARES, DECAY_SHARES],
            "seconds": round(seconds),
        },
    }
    finish(args.out, record)


if __name__ == "__main__":
    main()
