"""ONNX models as torch.onnx's exporter makes them of stock transformers models with a cache."""

from __future__ import annotations

import contextlib
import io
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

_DYNAMIC = torch.export.Dim.DYNAMIC


class _WithCache(torch.nn.Module):
    """A causal language model whose cache comes and goes as tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> Any:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        places = {"position_ids": position_ids} if _takes_positions(self.model) else {}
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **places,
        )
        layers = found.past_key_values.layers
        return found.logits, [(layer.keys, layer.values) for layer in layers]


def _takes_positions(model: Any) -> bool:
    return model.config.model_type not in ("bloom", "mpt")


def build_dynamo(checkpoint: Path, to: Path, attention: str, opset: int) -> None:
    """Export a checkpoint with torch.onnx (dynamo).

    Args:
        checkpoint: its folder.
        to: the folder of `model.onnx` and its weights, with the checkpoint's configuration.
        attention: "eager" or "sdpa", of transformers.
        opset: of the graph.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation=attention, dtype=torch.float32
    ).eval()
    config = model.config
    layers = config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch, new, past = 2, 3, 5
    caches = [tuple(torch.randn(batch, heads, past, dims) for _ in "kv") for _ in range(layers)]
    arguments = (
        torch.zeros(batch, new, dtype=torch.int64),
        torch.ones(batch, new + past, dtype=torch.int64),
        torch.arange(past, past + new)[None].repeat(batch, 1),
        caches,
    )
    row, cache = {0: _DYNAMIC, 1: _DYNAMIC}, {0: _DYNAMIC, 2: _DYNAMIC}
    names = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    to.mkdir(parents=True)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _WithCache(model),
            arguments,
            str(to / "model.onnx"),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=(row, row, row, [(cache, cache)] * layers),
            input_names=[
                *("input_ids", "attention_mask", "position_ids"),
                *(f"past_key_values.{name}" for name in names),
            ],
            output_names=["logits", *(f"present.{name}" for name in names)],
            external_data=True,
            verbose=False,
        )
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoint / name, to / name)
