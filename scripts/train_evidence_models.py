"""Train the models the evidence is measured on: a RoPE Llama and an ALiBi MPT.

    python scripts/train_evidence_models.py llama --out examples/evidence-llama
    python scripts/train_evidence_models.py mpt --out examples/evidence-mpt
    python scripts/train_evidence_models.py llama --no-start-token --tokens 3000000 --out build/…

Both read the King James Bible and five of Jane Austen's novels (scripts/corpora.py) in crops of
256 tokens, each behind a start token, and every twelfth sequence holds the passkey task. A run
that is interrupted goes on from its last checkpoint when started again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from corpora import HELDOUT_BOOKS, HELDOUT_NOVEL, Corpus, fetch_corpora
from ngram_baseline import build_levels, loss_under
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from train_demo_model import (
    BOS,
    CONTEXT,
    contiguous_windows,
    cpu_name,
    encode,
    loss_record,
    mean_loss,
    save_checkpoint,
    start_token_attention,
    stock_perplexity_by_length,
    with_bos,
)
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lminf_export.evaluate import passkey_text

VOCAB_SIZE = 4096
BATCH_SIZE = 8
PEAK_LEARNING_RATE = 5e-3
WEIGHT_DECAY = 0.1
WARMUP_STEPS = 150
DECAY_SHARE = 0.3
PASSKEY_SHARE = 1 / 12
TEMPLATE_REPEATS = 300
CHECKPOINT_EVERY = 100


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


def build_model(kind: str) -> PreTrainedModel:
    """Return the untrained model: about 3 M parameters, six layers of width 192."""
    shared = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": None}
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            pad_token_id=None,
            **shared,
        )
        model = LlamaForCausalLM(config)
    else:
        config = MptConfig(d_model=192, n_heads=6, n_layers=6, max_seq_len=CONTEXT, **shared)
        model = MptForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=0, do_sample=True, temperature=0.8, top_p=0.95
    )
    return model


def passkey_sequence(tokenizer: Tokenizer, length: int, dice: random.Random) -> list[int]:
    """Return ``length`` ids of the task, answer included, the last of them cut off.

    Several short instances or one that fills the sequence; where an instance would be longer,
    its beginning is cut away, so that questions without their header occur too.
    """
    ids: list[int] = []
    while len(ids) < length:
        before, after = dice.randrange(20), dice.randrange(25)
        key = f"{dice.randrange(10**5):05d}"
        task = passkey_text.compose(key, before, after, header=dice.random() < 0.7)
        text = task.prompt + task.answer + ".\n"
        ids += tokenizer.encode(text, add_special_tokens=False).ids[-length:]
    return ids[:length]


class Batches:
    """The training data: batch number n is the same in every run with the same seed."""

    def __init__(self, ids: torch.Tensor, tokenizer: Tokenizer, seed: int, start: bool) -> None:
        self._ids, self._tokenizer, self._seed, self._start = ids, tokenizer, seed, start

    def __getitem__(self, step: int) -> torch.Tensor:
        """Return (BATCH_SIZE, CONTEXT) ids."""
        dice = random.Random(f"{self._seed}/{step}")
        length = CONTEXT - 1 if self._start else CONTEXT
        rows = [self._row(length, dice) for _ in range(BATCH_SIZE)]
        batch = torch.stack(rows)
        return with_bos(batch) if self._start else batch

    def _row(self, length: int, dice: random.Random) -> torch.Tensor:
        if dice.random() < PASSKEY_SHARE:
            return torch.tensor(passkey_sequence(self._tokenizer, length, dice))
        start = dice.randrange(len(self._ids) - length + 1)
        return self._ids[start : start + length]


class Optimizer:
    """Muon for the layers' matrices, AdamW for the embedding and the norms' gains.

    Muon gets much further with few tokens. ``match_rms_adamw`` lets both share one learning rate.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        embedding = model.get_input_embeddings().weight
        parameters = list(model.parameters())
        matrices = [p for p in parameters if p.ndim >= 2 and p is not embedding]
        gains = [p for p in parameters if p.ndim < 2]
        adam = [{"params": [embedding], "weight_decay": WEIGHT_DECAY}, {"params": gains}]
        self._parts = {
            "muon": torch.optim.Muon(
                matrices, lr=0.0, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
            ),
            "adam": torch.optim.AdamW(adam, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0),
        }

    def step(self, rate: float) -> None:
        """Move the parameters by their gradients, and clear these."""
        for part in self._parts.values():
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(saved[name])


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, a plateau, and a linear decay to a fiftieth over the last part."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    left = (steps - step) / (DECAY_SHARE * steps)
    return PEAK_LEARNING_RATE * min(warm, max(0.02, min(1.0, left)))


def train(
    model: PreTrainedModel, batches: Batches, probes: dict[str, torch.Tensor], args: Any
) -> float:
    """Train in place, from the last checkpoint if there is one; return the seconds it took."""
    optimizer, compiled = Optimizer(model), torch.compile(model)
    steps = args.tokens // (BATCH_SIZE * CONTEXT)
    checkpoint = args.out / "checkpoint.pt"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["step"], saved["seconds"]
        print(f"going on from step {first}", flush=True)
    mark, running = time.monotonic(), []
    for step in range(first, steps):
        batch = batches[step]
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(learning_rate(step, steps))
        running.append(loss.item())
        done = step + 1
        if done % CHECKPOINT_EVERY == 0 or done == steps:
            seconds += time.monotonic() - mark
            report(model, probes, running, done, steps, seconds)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": done, "seconds": seconds}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            mark, running = time.monotonic(), []
    return seconds


def report(
    model: PreTrainedModel,
    probes: dict[str, torch.Tensor],
    running: list[float],
    step: int,
    steps: int,
    seconds: float,
) -> None:
    """One line of progress: losses and the mean attention weight on the first token."""
    model.eval()
    losses = "  ".join(f"{name} {mean_loss(model, rows):.3f}" for name, rows in probes.items())
    sink = max(attention_on_first(model, next(iter(probes.values()))[:8]))
    model.train()
    print(
        f"step {step}/{steps}  train {sum(running) / len(running):.3f}  {losses}  "
        f"on first token {sink:.3f}  {seconds:.0f} s",
        flush=True,
    )


def attention_on_first(model: PreTrainedModel, windows: torch.Tensor) -> list[float]:
    """Mean attention weight on the first token by layer; the model keeps its implementation."""
    before = model.config._attn_implementation
    weights = start_token_attention(model, windows)
    model.set_attn_implementation(before)
    return weights


def windows_of(ids: torch.Tensor, start: bool, limit: int | None = None) -> torch.Tensor:
    """Cut held-out ids into the sequences the model was trained on."""
    if start:
        return contiguous_windows(ids, CONTEXT, limit)
    return ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:limit]


def describe_run(
    model: PreTrainedModel, tokenizer: Tokenizer, corpora: list[Corpus], args: Any, seconds: float
) -> dict[str, Any]:
    """Everything training.json says, measured on the weights as they were saved."""
    train_ids = torch.cat([encode(tokenizer, corpus.train) for corpus in corpora])
    levels = build_levels(train_ids.tolist())
    held_out: dict[str, Any] = {}
    for corpus in corpora:
        ids = encode(tokenizer, corpus.heldout)
        density = len(ids) / len(corpus.heldout.encode())
        windows = windows_of(ids, args.start_token)
        ngram = loss_under(levels, ids.tolist(), VOCAB_SIZE)
        held_out[corpus.name] = {
            "tokens": len(ids),
            "bytes": len(corpus.heldout.encode()),
            "model": loss_record(mean_loss(model, windows), density),
            "kneser_ney_5gram": loss_record(ngram, density),
            "attention_on_first_token_by_layer": attention_on_first(model, windows[:32]),
        }
        if args.model == "llama" and args.start_token:
            held_out[corpus.name]["stock_perplexity_by_length"] = stock_perplexity_by_length(
                model, ids
            )
    return {
        "device": f"{cpu_name()}, {torch.get_num_threads()} threads, shared with other work",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
        "seed": args.seed,
        "start_token_in_training": args.start_token,
        "tokens_seen": args.tokens // (BATCH_SIZE * CONTEXT) * BATCH_SIZE * CONTEXT,
        "batch_size": BATCH_SIZE,
        "context": CONTEXT,
        "passkey_share": round(PASSKEY_SHARE, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds),
        "train_tokens": len(train_ids),
        "heldout_texts": {"kjv": list(HELDOUT_BOOKS), "austen": [HELDOUT_NOVEL]},
        "heldout": held_out,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("llama", "mpt"))
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--tokens", type=int, default=7_000_000, help="training tokens to see")
    parser.add_argument("--no-start-token", dest="start_token", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    transformers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    corpora = fetch_corpora()
    tokenizer = train_tokenizer([corpus.train for corpus in corpora])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS).save_pretrained(args.out)
    train_ids = torch.cat([encode(tokenizer, corpus.train) for corpus in corpora])
    probes = {}
    for corpus in corpora:
        (args.out / f"heldout-{corpus.name}.txt").write_text(corpus.heldout)
        ids = encode(tokenizer, corpus.heldout)
        print(f"{corpus.name}: {len(ids)} held-out tokens", flush=True)
        probes[corpus.name] = windows_of(ids, args.start_token, limit=32)
    print(f"{len(train_ids)} training tokens", flush=True)
    model = build_model(args.model)
    batches = Batches(train_ids, tokenizer, args.seed, args.start_token)
    seconds = train(model, batches, probes, args)
    save_checkpoint(model, args.out)
    saved = type(model).from_pretrained(args.out, dtype=torch.float32).eval()
    record = describe_run(saved, tokenizer, corpora, args, seconds)
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.out / "checkpoint.pt").unlink(missing_ok=True)
    print(json.dumps(record["heldout"], indent=1))


if __name__ == "__main__":
    main()
