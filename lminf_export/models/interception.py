"""Taking rotation and masks out of a model of transformers, so that its attention calls show them.

While `intercepted` is in force, a rotary module returns a `Turn` in place of cosines and sines,
`apply_rotary_pos_emb` returns queries and keys unchanged and announces that turn to the next
attention call, and the mask functions return what the layer may see (`Visible`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lminf_export.errors import ModelError
from lminf_export.models.base import Turn, Visible, announce_turn, nothing
from lminf_export.models.internals import Internals, code_of, codes_of, replaced
from lminf_export.models.remote_code import is_own_class
from lminf_export.models.written_attention import WrittenAttention, watching

APPLY_ROTATION = "apply_rotary_pos_emb"
_ROTARY = re.compile(r"(RotaryEmbedding|RotaryEmbeddings|RotaryEmb|LongRoPE|RoPE)$")


@contextmanager
def intercepted(model: nn.Module) -> Iterator[None]:
    """Take rotation and masks out of a model's code while the context lasts.

    Raises:
        ModelError: the model rotates by other means than `apply_rotary_pos_emb`.
    """
    codes = codes_of(model) or (code_of(model),)
    rotary = _rotary_modules(model)
    with ExitStack() as stack:
        rotating = [code for code in codes if hasattr(code, APPLY_ROTATION)]
        remember = _remember_turn
        if is_own_class(type(model)):
            watch = stack.enter_context(watching(model))
            remember = partial(_remember_for, watch)
            _leave_out_masks(model, codes, stack)
        for code in rotating:
            stack.enter_context(replaced(code, APPLY_ROTATION, remember))
        if rotary and not rotating:
            raise ModelError(
                f"{type(model).__name__} rotates by code of its own, not by "
                f"apply_rotary_pos_emb; the rotation cannot be taken out of it"
            )
        for code, (name, mask) in product(codes, _MASKS.items()):
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
        self, x: Tensor, position_ids: Any = None, layer_type: str | None = None, **_: Any
    ) -> tuple[Turn, Turn]:
        turn = Turn(self.path, layer_type)
        return turn, turn


def _remember_turn(
    query: Tensor, key: Tensor, cos: Turn, sin: Turn, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """Take the place of `apply_rotary_pos_emb`."""
    announce_turn(cos)
    return query, key


@contextmanager
def watched(model: nn.Module) -> Iterator[None]:
    """Let the step answer the attention of a model that rotates and masks as it always does."""
    if not is_own_class(type(model)):
        yield
        return
    with ExitStack() as stack:
        watch = stack.enter_context(watching(model))
        for code in codes_of(model):
            apply = getattr(code, APPLY_ROTATION, None)
            if apply is not None:
                stack.enter_context(replaced(code, APPLY_ROTATION, partial(_told, watch, apply)))
        yield


def _told(
    watch: WrittenAttention, apply: Callable[..., tuple[Tensor, Tensor]], *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    query, key = apply(*args, **kwargs)
    watch.rotated(query, key)
    return query, key


def _remember_for(watch: WrittenAttention, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Take the place of `apply_rotary_pos_emb` in code that may write its attention out."""
    query, key = _remember_turn(*args, **kwargs)
    watch.rotated(query, key)
    return query, key


def _leave_out_masks(model: nn.Module, codes: Iterable[ModuleType], stack: ExitStack) -> None:
    """Let code of a repository attend without the causal masks it builds by known names.

    Building one looks at its numbers, which a trace has not. A mask by another name is built, and
    hides nothing more: the probe shows that.
    """
    classes = {cls for part in model.modules() for cls in type(part).__mro__ if is_own_class(cls)}
    for owner, name in product((*codes, *classes), _OLDER_MASKS):
        if name in vars(owner):
            stack.enter_context(replaced(owner, name, nothing))


def _causal(*_: Any, **__: Any) -> Visible:
    return Visible()


def _sliding(config: Any, *_: Any, **__: Any) -> Visible:
    return Visible(int(config.sliding_window))


def _chunked(*_: Any, **__: Any) -> Visible:
    raise ModelError(
        "this model masks in chunks of absolute positions; a window that slides cannot follow it"
    )


_OLDER_MASKS = (
    "_prepare_4d_causal_attention_mask",
    "_prepare_4d_causal_attention_mask_for_sdpa",
    "_prepare_decoder_attention_mask",
    "_update_causal_mask",
)
_MASKS = {
    "create_causal_mask": _causal,
    "create_sliding_window_causal_mask": _sliding,
    "create_chunked_causal_mask": _chunked,
}


def _rotary_modules(model: nn.Module) -> list[str]:
    """Return the paths of a model's rotary embeddings."""
    return [path for path, module in model.named_modules() if _ROTARY.search(type(module).__name__)]


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
