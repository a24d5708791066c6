"""The content of a demo model's training.json: losses on held-out text, beside a 5-gram model."""

from __future__ import annotations

import math
import platform
import re
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from scripts.train.corpora import HELDOUT_BOOKS, HELDOUT_NOVEL, Corpus
from scripts.train.ngram_baseline import build_levels, loss_under
from scripts.train.training_data import (
    BATCH_SIZE,
    CONTEXT,
    PASSKEY_SHARE,
    VOCAB_SIZE,
    contiguous_windows,
    encode,
    windows_of,
)

STRETCHED_LENGTHS = (256, 512, 1024, 2048, 4096)


@torch.no_grad()
def token_losses(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Return the loss of every token after the first, shape (B, S - 1), nats, float32."""
    rows = max(1, 4096 // windows.shape[1])
    losses = []
    for chunk in windows.split(rows):
        logits = model(input_ids=chunk, use_cache=False).logits[:, :-1]
        losses.append(F.cross_entropy(logits.transpose(1, 2), chunk[:, 1:], reduction="none"))
    return torch.cat(losses)


def mean_loss(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Return the mean loss in nats per token."""
    return token_losses(model, windows).mean().item()


def loss_record(loss: float, tokens_per_byte: float) -> dict[str, float]:
    """The three usual ways to state one loss."""
    bits = loss / math.log(2) * tokens_per_byte
    return {
        "loss": round(loss, 4),
        "perplexity_per_token": round(math.exp(loss), 3),
        "bits_per_byte": round(bits, 4),
    }


def stock_perplexity_by_length(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, dict]:
    """Perplexity of unmodified attention on the same text cut into ever longer sequences."""
    result = {}
    for length in STRETCHED_LENGTHS:
        losses = token_losses(model, contiguous_windows(ids, length))
        result[str(length)] = {
            "sequences": len(losses),
            "perplexity": round(losses.mean().exp().item(), 2),
            "perplexity_of_last_64_tokens": round(losses[:, -64:].mean().exp().item(), 2),
        }
    return result


@torch.no_grad()
def attention_on_first(model: PreTrainedModel, windows: torch.Tensor) -> list[float]:
    """Mean attention weight on the first token by layer, from the second half of each window."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that returns its weights
    layers = model(input_ids=windows, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return [round(weights[:, :, CONTEXT // 2 :, 0].mean().item(), 4) for weights in layers]


def describe_run(
    model: PreTrainedModel, tokenizer: Tokenizer, corpora: list[Corpus], args: Any, seconds: float
) -> dict[str, Any]:
    """Everything training.json says, measured on the weights as they were saved."""
    return {
        **describe_machine(),
        "seed": args.seed,
        "start_token_in_training": args.start_token,
        "tokens_seen": args.tokens // (BATCH_SIZE * CONTEXT) * BATCH_SIZE * CONTEXT,
        "batch_size": BATCH_SIZE,
        "context": CONTEXT,
        "passkey_share": round(PASSKEY_SHARE, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds),
        "train_tokens": sum(len(encode(tokenizer, corpus.train)) for corpus in corpora),
        "heldout_texts": {"kjv": list(HELDOUT_BOOKS), "austen": [HELDOUT_NOVEL]},
        "heldout": describe_heldout(model, tokenizer, corpora, args.start_token),
    }


def describe_machine() -> dict[str, Any]:
    """Return the device and versions of a training."""
    return {
        "device": f"{cpu_name()}, {torch.get_num_threads()} threads, shared with other work",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
    }


def describe_heldout(
    model: PreTrainedModel, tokenizer: Tokenizer, corpora: list[Corpus], start: bool
) -> dict[str, Any]:
    """Losses on each corpus' held-out text, beside a 5-gram model's."""
    train_ids = torch.cat([encode(tokenizer, corpus.train) for corpus in corpora])
    levels = build_levels(train_ids.tolist())
    held_out: dict[str, Any] = {}
    for corpus in corpora:
        ids = encode(tokenizer, corpus.heldout)
        density = len(ids) / len(corpus.heldout.encode())
        windows = windows_of(ids, start)
        ngram = loss_under(levels, ids.tolist(), VOCAB_SIZE)
        held_out[corpus.name] = {
            "tokens": len(ids),
            "bytes": len(corpus.heldout.encode()),
            "model": loss_record(mean_loss(model, windows), density),
            "kneser_ney_5gram": loss_record(ngram, density),
            "attention_on_first_token_by_layer": attention_on_first(model, windows[:32]),
        }
        if model.config.model_type == "llama" and start:
            held_out[corpus.name]["stock_perplexity_by_length"] = stock_perplexity_by_length(
                model, ids
            )
    return held_out


def cpu_name() -> str:
    """The processor's marketing name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.machine()
