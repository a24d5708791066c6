"""Train the demo models, which docs/evidence.md is measured on: a RoPE Llama and an ALiBi MPT.

    python scripts/train_demo_models.py llama --out examples/demo-llama
    python scripts/train_demo_models.py mpt --out examples/demo-mpt
    python scripts/train_demo_models.py llama --no-start-token --tokens 3000000 --out build/…

Both read the King James Bible and five of Jane Austen's novels (scripts/corpora.py) in crops of
256 tokens, each behind a start token, and every twelfth sequence holds the passkey task. A run
that is interrupted goes on from its last checkpoint when started again.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from corpora import fetch_corpora
from training_data import (
    BATCH_SIZE,
    BOS,
    CONTEXT,
    HELDOUT_FILES,
    VOCAB_SIZE,
    Batches,
    encode,
    train_tokenizer,
    windows_of,
)
from training_record import attention_on_first, describe_run, mean_loss
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PEAK_LEARNING_RATE = 5e-3
WEIGHT_DECAY = 0.1
WARMUP_STEPS = 150
DECAY_SHARE = 0.55
CHECKPOINT_EVERY = 100


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


def save_checkpoint(model: PreTrainedModel, out: Path) -> None:
    """Write the model as fp16 safetensors; readers see the old files or the new, never half."""
    with tempfile.TemporaryDirectory(dir=out) as staging:
        copy.deepcopy(model).half().save_pretrained(staging)
        for file in Path(staging).iterdir():
            file.chmod(0o644)  # safetensors writes for the owner only
            file.replace(out / file.name)


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
        (args.out / HELDOUT_FILES[corpus.name]).write_text(corpus.heldout)
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
