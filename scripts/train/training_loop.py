"""How the demo models are trained: optimizer, schedule, checkpoints."""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedModel

from scripts.train.training_record import attention_on_first, mean_loss

WEIGHT_DECAY = 0.1
CHECKPOINT_EVERY = 100
CHECKPOINT = "checkpoint.pt"


class Batches(Protocol):
    """Training data by step: ids (B, S), and how much each of them counts as a target (B, S)."""

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, a plateau, and a linear decay to a fiftieth.

    Attributes:
        steps: all of them.
        peak: the plateau's learning rate.
        warmup: steps of the warm-up.
        decay: steps of the decay.
    """

    steps: int
    peak: float
    warmup: int
    decay: int

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup)
        left = (self.steps - step) / self.decay
        return self.peak * min(warm, max(0.02, min(1.0, left)))


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


def add_options(parser: argparse.ArgumentParser, seed: int) -> None:
    """Add what every training takes."""
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def prepare(args: argparse.Namespace) -> None:
    """Set threads and seed, and make the folder."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    transformers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)


def train(
    model: PreTrainedModel,
    batches: Batches,
    probes: dict[str, torch.Tensor],
    schedule: Schedule,
    out: Path,
) -> float:
    """Train in place, from the folder's checkpoint if it has one; return the seconds it took."""
    checkpoint = out / CHECKPOINT
    optimizer, compiled = Optimizer(model), torch.compile(model)
    first, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["step"], saved["seconds"]
        print(f"going on from step {first}", flush=True)
    mark, running = time.monotonic(), []
    for step in range(first, schedule.steps):
        loss = batch_loss(compiled, *batches[step])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(schedule.rate(step))
        running.append(loss.item())
        done = step + 1
        if done % CHECKPOINT_EVERY == 0 or done == schedule.steps:
            seconds += time.monotonic() - mark
            report(model, probes, running, f"{done}/{schedule.steps}", seconds)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": done, "seconds": seconds}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            mark, running = time.monotonic(), []
    return seconds


def batch_loss(model: Any, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of the targets, weighted, in nats: products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    counted = weights[:, 1:].flatten()
    return (losses * counted).sum() / counted.sum()


def report(
    model: PreTrainedModel,
    probes: dict[str, torch.Tensor],
    running: list[float],
    step: str,
    seconds: float,
) -> None:
    """One line of progress: losses and the mean attention weight on the first token."""
    model.eval()
    losses = "  ".join(f"{name} {mean_loss(model, rows):.3f}" for name, rows in probes.items())
    sink = max(attention_on_first(model, next(iter(probes.values()))[:8]))
    model.train()
    print(
        f"step {step}  train {sum(running) / len(running):.3f}  {losses}  "
        f"on first token {sink:.3f}  {seconds:.0f} s",
        flush=True,
    )


def save_model(model: PreTrainedModel, out: Path) -> None:
    """Write the model as fp16 safetensors; readers see the old files or the new, never half."""
    with tempfile.TemporaryDirectory(dir=out) as staging:
        copy.deepcopy(model).half().save_pretrained(staging)
        for file in Path(staging).iterdir():
            file.chmod(0o644)  # safetensors writes for the owner only
            file.replace(out / file.name)


def finish(out: Path, record: dict[str, Any]) -> None:
    """Write what was measured of the saved model; a next start would begin from the first step."""
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / CHECKPOINT).unlink(missing_ok=True)
    print(json.dumps(record["heldout"], indent=1))
