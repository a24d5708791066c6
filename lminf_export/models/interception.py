"""Taking rotation and masks out of a model of transformers, so that its attention calls show them.

While `intercepted` is in force, a rotary module returns a `Turn` in place of cosines and sines,
`apply_rotary_pos_emb` returns queries and keys unchanged and announces that turn to the next
attention call, and the mask functions return what the layer may see (`Visible`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lminf_export.errors import ModelError
from lminf_export.models.base import Turn, Visible, announce_turn
from lminf_export.models.internals import Internals, code_of, replaced


@contextmanager
def intercepted(model: nn.Module) -> Iterator[None]:
    """Take rotation and masks out of a model's code while the context lasts.

    Raises:
        ModelError: the model rotates by other means than `apply_rotary_pos_emb`.
    """
    code = code_of(model)
    rotary = _rotary_modules(model)
    with ExitStack() as stack:
        if hasattr(code, "apply_rotary_pos_emb"):
            stack.enter_context(replaced(code, "apply_rotary_pos_emb", _remember_turn))
        elif rotary:
            raise ModelError(
                f"{type(model).__name__} rotates by code of its own, not by "
                f"apply_rotary_pos_emb; the rotation cannot be taken out of it"
            )
        for name, mask in _MASKS.items():
            if hasattr(code, name):
                stack.enter_context(replaced(code, name, mask))
        for module in model.modules():
            stack.enter_context(_known_embed_scale(module))
        for path in rotary:
            parent, _, name = path.rpartition(".")
            owner = model.get_submodule(parent)
            stack.enter_context(replaced(owner, name, _TurnSource(path, model.get_submodule(path))))
        yield


class _TurnSource(nn.Module):
    """Takes the place of a rotary module: returns a `Turn` for cosines and another for sines."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        self.path = path
        self._replaced = (module,)  # in a tuple: not a submodule, or its buffers would be ours

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the replaced module: some models read its configuration."""
        return getattr(self.__dict__["_replaced"][0], name)

    def forward(
        self, x: Tensor, position_ids: Tensor | None = None, layer_type: str | None = None
    ) -> tuple[Turn, Turn]:
        turn = Turn(self.path, layer_type)
        return turn, turn


def _remember_turn(
    query: Tensor, key: Tensor, cos: Turn, sin: Turn, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """Take the place of `apply_rotary_pos_emb`."""
    announce_turn(cos)
    return query, key


def _causal(*_: Any, **__: Any) -> Visible:
    return Visible()


def _sliding(config: Any, *_: Any, **__: Any) -> Visible:
    return Visible(int(config.sliding_window))


def _chunked(*_: Any, **__: Any) -> Visible:
    raise ModelError(
        "this model masks in chunks of absolute positions; a window that slides cannot follow it"
    )


_MASKS = {
    "create_causal_mask": _causal,
    "create_sliding_window_causal_mask": _sliding,
    "create_chunked_causal_mask": _chunked,
}


def _rotary_modules(model: nn.Module) -> list[str]:
    """Return the paths of a model's rotary embeddings."""
    return [
        path
        for path, module in model.named_modules()
        if type(module).__name__.endswith("RotaryEmbedding")
    ]


class _Factor(float):
    """A number in the place of a tensor without dimensions."""

    def to(self, dtype: torch.dtype) -> float:
        return torch.tensor(float(self), dtype=dtype, device="cpu").item()


@contextmanager
def _known_embed_scale(module: nn.Module) -> Iterator[None]:
    """Give scaled embeddings their factor: the buffer that holds it is empty on the meta device."""
    scale = module._buffers.get("embed_scale")
    if scale is None or not scale.is_meta:
        yield
        return
    factor = Internals("models that scale their embeddings").member(module, "scalar_embed_scale")
    del module._buffers["embed_scale"]
    module.__dict__["embed_scale"] = _Factor(factor)
    try:
        yield
    finally:
        del module.__dict__["embed_scale"]
        module._buffers["embed_scale"] = scale
