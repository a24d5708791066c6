"""Ways to round the keys and values of a ring to int8, and what each costs.

The reference step runs a model with rings that round in each way, and without rounding, over the
same tokens. `demo-llama` also gets a bias of its keys, of a given norm in every layer and head: in
one slow dimension, or in all. A folder of another model may be given.

    python -m benchmarks.evaluation.ring_rounding --model /path/of/gemma-3-270m \\
        --out benchmarks/results/ring_rounding.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from benchmarks.support.result import write_result
from lminf_export.checkpoint.opening import load_model, open_checkpoint
from lminf_export.checkpoint.source import open_source
from lminf_export.models.base import ATTENTION_NAME, AttentionCall, AttentionPlan, Family
from lminf_export.models.history import HistoryStep
from lminf_export.models.registry import find_family
from lminf_export.models.rounded_rings import Int8Rings, Rings
from lminf_export.models.steps import run
from lminf_export.operator.reference import Rounding
from lminf_export.operator.reference_int8 import round_to_int8
from lminf_export.operator.settings import LambdaConfig
from lminf_export.runtime.environment import environment
from lminf_export.verify.perplexity_cost import perplexity_cost

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo-llama"
TEXT = DEMO / "heldout-austen.txt"
CHUNK = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of another model")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--norms", type=float, nargs="+", default=[300.0, 900.0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    demo = Subject(DEMO, arguments.tokens)
    rows += demo.rows("none")
    for norm in arguments.norms:
        for kind in ("slow", "all"):
            demo.set_bias(kind, norm)
            rows += demo.rows(kind, norm)
    if arguments.model is not None:
        rows += Subject(arguments.model, arguments.tokens).rows("none")
    result = {"benchmark": "ring_rounding", "text": TEXT.name, "rows": rows, **environment()}
    write_result(arguments.out, result)


@dataclass(frozen=True)
class Blocks:
    """Rings with a scale for every block of a row."""

    size: int
    keeps_bias: bool = True

    def of_layer(
        self, layer: int, heads: slice, position: Tensor, bias: Tensor | None
    ) -> tuple[Rounding, Rounding]:
        rounding = partial(round_in_blocks, size=self.size)
        return rounding, rounding


def round_in_blocks(x: Tensor, size: int) -> Tensor:
    size = min(size, x.shape[-1])
    return round_to_int8(x.unflatten(-1, (-1, size))).flatten(-2)


@dataclass(frozen=True)
class ScaledDimensions:
    """Rings whose keys are divided, before they are rounded, by what each dimension reaches.

    Attributes:
        sizes: for each layer (G, D), equal in the two dimensions of a rotated pair.
    """

    sizes: dict[int, Tensor]
    keeps_bias: bool = True

    def of_layer(
        self, layer: int, heads: slice, position: Tensor, bias: Tensor | None
    ) -> tuple[Rounding, Rounding]:
        size = self.sizes[layer][None, heads, None]
        return lambda x: round_to_int8(x / size) * size, round_to_int8


class Watched(HistoryStep):
    """A step with exact rings that keeps the root mean square of every dimension of keys."""

    def __init__(self, plan: AttentionPlan) -> None:
        super().__init__(plan)
        self.squares: dict[int, list[Tensor]] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        self.squares.setdefault(call.layer, []).append(call.key[0].square().mean(1))
        return super().attend(call)

    def sizes(self) -> dict[int, Tensor]:
        return {k: self._in_pairs(k, torch.stack(x).mean(0)) for k, x in self.squares.items()}

    def _in_pairs(self, layer: int, square: Tensor) -> Tensor:
        index = self.plan.layer_rotation[layer]
        if index is None:
            return square.sqrt().clamp_min(1e-6)
        rotation = self.plan.rotations[index]
        half = rotation.rotary_dim // 2
        place = torch.arange(square.shape[1])
        own = place % half if not rotation.interleaved else place // 2
        pair = torch.where(place < 2 * half, own, place)
        sums = torch.zeros_like(square).index_add(1, pair, square)
        return sums[:, pair].sqrt().clamp_min(1e-3 * float(sums.max().sqrt()))


@dataclass
class Subject:
    """A model and the tokens it reads."""

    folder: Path
    count: int
    family: Family = field(init=False)
    plan: AttentionPlan = field(init=False)
    model: nn.Module = field(init=False)
    tokens: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        source = open_source(self.folder)
        checkpoint = open_checkpoint(source)
        self.family = find_family(source.model_type)
        window = min(self.family.training_length(source.config) or 512, 512)
        settings = LambdaConfig(window_size=window)
        self.plan = self.family.plan(source.config, settings, lambda: checkpoint.skeleton.model)
        self.model = load_model(checkpoint, torch.float32, ATTENTION_NAME)
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.no_truncation()
        ids = tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids
        self.tokens = np.asarray(ids[: self.count], np.int64)

    def set_bias(self, kind: str, norm: float) -> None:
        generator = torch.Generator().manual_seed(1)
        for layer, spec in zip(self.model.model.layers, self.plan.layers, strict=True):
            bias = torch.zeros(spec.num_kv_heads, spec.head_dim)
            if kind == "slow":
                bias[:, -1] = norm
            else:
                bias = torch.randn(bias.shape, generator=generator)
                bias *= norm / bias.norm(dim=1, keepdim=True)
            layer.self_attn.k_proj.bias = nn.Parameter(bias.flatten())

    @torch.no_grad()
    def logits(self, step: HistoryStep) -> np.ndarray:
        found = []
        with self.family.patched(self.model):
            for start in range(0, len(self.tokens), CHUNK):
                piece = torch.from_numpy(self.tokens[None, start : start + CHUNK])
                step.begin(torch.tensor([piece.shape[1]]))
                index = torch.arange(piece.shape[1])[None]
                found.append(run(self.model, piece, step, index)[0].float())
        return torch.cat(found).numpy()

    def rows(self, bias: str, norm: float = 0.0) -> list[dict[str, Any]]:
        watched = Watched(self.plan)
        exact = self.logits(watched)
        ways: dict[str, Callable[[], Rings]] = {
            "a scale for each row": lambda: Int8Rings(keeps_bias=True),
            "blocks of 32": lambda: Blocks(32),
            "blocks of 16": lambda: Blocks(16),
            "dimensions scaled by their size": lambda: ScaledDimensions(watched.sizes()),
        }
        if norm:
            ways["a scale for each row, bias kept out"] = Int8Rings
        rows = []
        for name, rings in ways.items():
            logits = self.logits(HistoryStep(self.plan, rounded=rings()))
            error = np.abs(logits - exact) / (exact.max() - exact.min())
            cost = perplexity_cost(exact, logits, self.tokens)
            row = {
                "model": self.folder.name,
                "bias": bias,
                "norm": norm,
                "window": max(layer.window_size for layer in self.plan.layers),
                "head_dim": self.plan.layers[0].head_dim,
                "rounding": name,
                "max_error": float(error.max()),
                "mean_error": float(error.mean()),
                "perplexity": cost.unquantized,
                "cost": cost.cost,
                "standard_error": cost.standard_error,
                "tokens": cost.tokens,
            }
            print(row, file=sys.stderr)
            rows.append(row)
        return rows


if __name__ == "__main__":
    main()
