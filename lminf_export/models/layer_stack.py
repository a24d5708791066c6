"""Where a model's layers are."""

from __future__ import annotations

from torch import nn


def layer_lists(model: nn.Module, num_layers: int) -> list[str]:
    """Return the paths of a model's outermost lists of that many modules."""
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    return [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]
