"""Checkpoints whose weights are made quantised ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def quantise(
    folder: Path,
    settings: dict[str, Any],
    change: Callable[[str, torch.Tensor], dict[str, torch.Tensor] | None],
) -> None:
    """Replace tensors of a checkpoint by what `change(name, tensor)` returns; None keeps one."""
    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        tensors.update(change(name, tensor) or {name: tensor})
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def random_mxfp4_experts(folder: Path) -> None:
    """Replace the experts of a gpt-oss by random ones as the hub has them."""
    generator = torch.Generator().manual_seed(5)

    def pack(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        experts, inputs, outputs = tensor.shape
        blocks = (experts, outputs, inputs // 32, 16)
        packed = torch.randint(0, 256, blocks, dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 126, blocks[:3], dtype=torch.uint8, generator=generator)
        return {f"{name}_blocks": packed, f"{name}_scales": scales}

    quantise(folder, MXFP4, pack)
