"""Train the demo model of examples/demo-llama: a small Llama on the King James Bible.

    python scripts/train_demo_model.py

The text comes from the Debian packages bible-kjv and bible-kjv-text, which are downloaded
and unpacked, not installed; elsewhere pass --text FILE with what
`bible -f gen1:1-rev22:21` prints. torch.compile needs a C++ compiler (or --no-compile).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import re
import tempfile
import time
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from corpora import HELDOUT_BOOKS, fetch_bible, split_bible
from ngram_baseline import kneser_ney_loss
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256
VOCAB_SIZE = 4096
BOS = "<|bos|>"
BATCH_SIZE = 16
PEAK_LEARNING_RATE = 2.5e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
STRETCHED_LENGTHS = (256, 512, 1024, 2048, 4096)


def train_tokenizer(text: str) -> Tokenizer:
    """Return a byte-level BPE tokenizer that starts every text with the start token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Return the ids of a text without the start token, shape (tokens,), int64."""
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)


def build_model() -> LlamaForCausalLM:
    """Return the untrained model: 3.1 M parameters, 6 query heads on 2 KV heads."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=0, do_sample=True, temperature=0.8, top_p=0.95
    )
    return model


def with_bos(crops: torch.Tensor) -> torch.Tensor:
    """Prefix each row of ids, shape (B, S), with the start token."""
    return F.pad(crops, (1, 0), value=0)


def random_batch(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return (BATCH_SIZE, CONTEXT) ids: the start token, then a random crop of the text.

    The start token stands first in every sequence: an attention sink, the place where a head
    rests that wants to attend to nothing, needs one token that is always there.
    ``attention_on_start_token_by_layer`` in training.json says how far one has formed.
    """
    starts = torch.randint(len(ids) - CONTEXT + 2, (BATCH_SIZE, 1), generator=generator)
    return with_bos(ids[starts + torch.arange(CONTEXT - 1)])


def contiguous_windows(ids: torch.Tensor, length: int, limit: int | None = None) -> torch.Tensor:
    """Cut ids into neighbouring sequences of ``length``, start token included: (B, length)."""
    count = len(ids) // (length - 1)
    rows = ids[: count * (length - 1)].view(count, length - 1)
    return with_bos(rows[:limit])


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a twentieth of the peak."""
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    if step < warmup:
        return PEAK_LEARNING_RATE * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return PEAK_LEARNING_RATE * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def build_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves the norms' gains alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


@torch.no_grad()
def token_losses(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Return the loss of every token after the first, shape (B, S - 1), nats, float32."""
    rows = max(1, 4096 // windows.shape[1])
    losses = []
    for chunk in windows.split(rows):
        logits = model(input_ids=chunk, use_cache=False).logits[:, :-1]
        losses.append(F.cross_entropy(logits.transpose(1, 2), chunk[:, 1:], reduction="none"))
    return torch.cat(losses)


def mean_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
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


def stock_perplexity_by_length(model: LlamaForCausalLM, ids: torch.Tensor) -> dict[str, dict]:
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
def start_token_attention(model: LlamaForCausalLM, windows: torch.Tensor) -> list[float]:
    """Mean attention weight on the start token, per layer, from the second half of each window."""
    model.set_attn_implementation("eager")  # the only one that returns its weights
    layers = model(input_ids=windows, use_cache=False, output_attentions=True).attentions
    return [round(weights[:, :, CONTEXT // 2 :, 0].mean().item(), 4) for weights in layers]


def save_checkpoint(model: LlamaForCausalLM, out: Path) -> None:
    """Write the model as fp16 safetensors; readers see the old files or the new, never half."""
    with tempfile.TemporaryDirectory(dir=out) as staging:
        copy.deepcopy(model).half().save_pretrained(staging)
        for file in Path(staging).iterdir():
            file.chmod(0o644)  # safetensors writes for the owner only
            file.replace(out / file.name)


def train(
    model: LlamaForCausalLM, ids: torch.Tensor, heldout: torch.Tensor, args: argparse.Namespace
) -> float:
    """Train in place, with a checkpoint at every report; return the seconds it took."""

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    compiled = torch.compile(loss_of) if args.compile else loss_of
    optimizer = build_optimizer(model)
    generator = torch.Generator().manual_seed(args.seed)
    probe = contiguous_windows(heldout, CONTEXT, limit=48)
    began = mark = time.monotonic()
    running = torch.zeros(())
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        optimizer.zero_grad()
        loss = compiled(random_batch(ids, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += loss.detach()
        if (step + 1) % args.report_every == 0:
            speed = args.report_every * BATCH_SIZE * CONTEXT / (time.monotonic() - mark)
            print(
                f"step {step + 1}/{args.steps}  train {running / args.report_every:.3f}  "
                f"held-out {mean_loss(model, probe):.3f}  {speed:.0f} tokens/s  "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
            save_checkpoint(model, args.out)
            running, mark = torch.zeros(()), time.monotonic()
    return time.monotonic() - began


def describe_run(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    train_text: str,
    heldout_text: str,
    args: argparse.Namespace,
    seconds: float,
) -> dict:
    """Everything training.json says, measured on the weights as they were saved."""
    train_ids, heldout_ids = encode(tokenizer, train_text), encode(tokenizer, heldout_text)
    train_density = len(train_ids) / len(train_text.encode())
    density = len(heldout_ids) / len(heldout_text.encode())
    heldout_windows = contiguous_windows(heldout_ids, CONTEXT)
    spread = contiguous_windows(train_ids, CONTEXT)
    train_windows = spread[:: max(1, len(spread) // len(heldout_windows))]
    ngram = kneser_ney_loss(train_ids.tolist(), heldout_ids.tolist(), VOCAB_SIZE)
    return {
        "device": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
        "seed": args.seed,
        "steps": args.steps,
        "batch_size": BATCH_SIZE,
        "context": CONTEXT,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": args.steps * BATCH_SIZE * CONTEXT,
        "seconds": round(seconds),
        "train_tokens": len(train_ids),
        "heldout_tokens": len(heldout_ids),
        "heldout_bytes": len(heldout_text.encode()),
        "heldout_books": list(HELDOUT_BOOKS),
        "train": loss_record(mean_loss(model, train_windows), train_density),
        "heldout": loss_record(mean_loss(model, heldout_windows), density),
        "heldout_kneser_ney_5gram": loss_record(ngram, density),
        "stock_perplexity_by_length": stock_perplexity_by_length(model, heldout_ids),
        "attention_on_start_token_by_layer": start_token_attention(model, heldout_windows[:32]),
    }


def cpu_name() -> str:
    """The processor's marketing name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.machine()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    default_out = Path(__file__).resolve().parents[1] / "examples" / "demo-llama"
    parser.add_argument("--out", type=Path, default=default_out, help="model folder to write")
    parser.add_argument("--text", type=Path, help="output of `bible -f gen1:1-rev22:21`")
    # Four passes over the text: in a run planned for thirteen, the held-out loss rose after six.
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--report-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    transformers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    verses = args.text.read_text() if args.text else fetch_bible()
    train_text, heldout_text = split_bible(verses)
    (args.out / "heldout.txt").write_text(heldout_text)
    tokenizer = train_tokenizer(train_text)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS).save_pretrained(args.out)
    train_ids, heldout_ids = encode(tokenizer, train_text), encode(tokenizer, heldout_text)
    print(f"{len(train_ids)} training tokens, {len(heldout_ids)} held-out tokens", flush=True)
    model = build_model()
    seconds = train(model, train_ids, heldout_ids, args)
    save_checkpoint(model, args.out)
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    record = describe_run(saved, tokenizer, train_text, heldout_text, args, seconds)
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["heldout"]))


if __name__ == "__main__":
    main()
