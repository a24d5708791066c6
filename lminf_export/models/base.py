"""What an exporter needs to know about a model, and the seam where its attention is replaced.

A family says how its layers attend (`AttentionPlan`) and how its code is opened
(`Family.patched`): the attention of every layer then reaches `attend` below with queries and
keys that carry no position. Who answers is decided by the step in force (`use_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from lminf_export.bindings import LayerSpec
from lminf_export.config import LambdaConfig

ATTENTION_NAME = "lambda_attention"


@dataclass(frozen=True)
class Rotation:
    """One kind of rotary embedding; models may have several.

    Attributes:
        inv_freq: (R/2,) float32 radians per token, scaling included.
        attention_factor: m of YaRN, 1 elsewhere.
        interleaved: pairs (2i, 2i+1) instead of (i, i + R/2).
    """

    inv_freq: Tensor
    attention_factor: float = 1.0
    interleaved: bool = False

    @property
    def rotary_dim(self) -> int:
        """R, rotated dimensions of a head."""
        return 2 * self.inv_freq.numel()


@dataclass(frozen=True)
class AttentionPlan:
    """How every layer of a model attends.

    Attributes:
        layers: cache and Λ rule of each layer, in order.
        num_attention_heads: H.
        rotations: the model's rotary kinds.
        layer_rotation: for each layer an index into rotations, or None for no rotation.
        softcap: soft cap of the logits, 0 for none.
        alibi_slopes: (H,) float32, or None.
        notices: what the user should be told about this model.
    """

    layers: tuple[LayerSpec, ...]
    num_attention_heads: int
    rotations: tuple[Rotation, ...]
    layer_rotation: tuple[int | None, ...]
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    notices: tuple[str, ...] = ()


class Family(Protocol):
    """One kind of model; see docs/adding_a_model.md."""

    model_types: tuple[str, ...]

    def training_length(self, config: Any) -> int | None:
        """Tokens the model was first trained on, before any extension."""
        ...

    def plan(self, config: Any, settings: LambdaConfig) -> AttentionPlan:
        """Describe the attention of every layer under these Λ settings."""
        ...

    def patched(self, model: nn.Module) -> AbstractContextManager[None]:
        """Open the model: within, attention arrives unrotated at `attend`."""
        ...


class Step(Protocol):
    """Answers the attention of one forward pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return (B, H, S, D) for query (B, H, S, D), key and value (B, G, S, D), unrotated."""
        ...


_step: ContextVar[Step] = ContextVar("lminf_step")


@contextmanager
def use_step(step: Step) -> Iterator[None]:
    """Answer every attention call within by this step."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Stand in for an attention function of transformers: (B, H, S, D) in, (B, S, H, D) out.

    transformers passes settings that the step in force has from its plan already.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _step.get().attend(module.layer_idx, query, key, value, scale)  # type: ignore[arg-type]
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class NoRotaryEmbedding(nn.Module):
    """Takes the place of a model's rotary module; nobody reads what it returns."""

    def forward(self, *_: Any, **__: Any) -> tuple[None, None]:
        """Return nothing twice, where cos and sin were."""
        return None, None


def unrotated(query: Tensor, key: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Take the place of `apply_rotary_pos_emb`: queries and keys stay as they are."""
    return query, key


def register_attention(registry: Any) -> None:
    """Make `attend` known to transformers under ATTENTION_NAME."""
    attention: Callable[..., Any] = attend
    registry.register(ATTENTION_NAME, attention)
