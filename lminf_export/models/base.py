"""Facts that an exporter needs about a model, and the interface where its attention is replaced.

A family says how its layers attend (`AttentionPlan`) and how its code is opened
(`Family.patched`): the attention of every layer then reaches `attend` below with queries and
keys that carry no position. The step in force (`use_step`) computes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lminf_export.errors import ConfigError, LminfError, ModelError, shortened
from lminf_export.models.experts import EXPERTS_NAME, register_experts
from lminf_export.models.internals import Internals
from lminf_export.models.key_bias import bias_of_keys
from lminf_export.models.remote_code import new_model, runs_own_code
from lminf_export.models.transformers_tables import CODE_ERRORS
from lminf_export.operator.bindings import LayerSpec
from lminf_export.operator.settings import LambdaConfig, ring_capacity
from lminf_export.tensors.stored import SourceTensor

ATTENTION_NAME = "lambda_attention"
# Model types whose families replace the forward of the attention module itself.
REPLACED_FORWARDS = ("bloom", "codegen", "falcon", "gptj", "mpt")


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

    def equals(self, other: Rotation) -> bool:
        """Whether two rotations turn alike."""
        same = (self.attention_factor, self.interleaved) == (
            other.attention_factor,
            other.interleaved,
        )
        return same and torch.equal(self.inv_freq, other.inv_freq)

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
        sink_logits: the layers have learned sink logits.
        sliding: for each layer whether its window is its own, from training.
        notices: lines for the user about this model.
        key_bias_in_rings: rings of int8 round keys with their bias, as an engine's plugin does.
    """

    layers: tuple[LayerSpec, ...]
    num_attention_heads: int
    rotations: tuple[Rotation, ...]
    layer_rotation: tuple[int | None, ...]
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sink_logits: bool = False
    sliding: tuple[bool, ...] = ()
    notices: tuple[str, ...] = ()
    key_bias_in_rings: bool = False

    def keeps_bias_out(self, layer: int) -> bool:
        """Whether a ring of int8 lacks the bias of its keys, if it may: it rotates as others do."""
        may = self.layer_rotation[layer] is not None or not self.rotations
        return may and not self.key_bias_in_rings

    def of_first(self, count: int) -> AttentionPlan:
        """Return the plan of the same model with its first `count` layers only."""
        return replace(
            self,
            layers=self.layers[:count],
            layer_rotation=self.layer_rotation[:count],
            sliding=self.sliding[:count],
        )


class AnyWeights:
    """A family that can be exported with any weights.

    Args:
        model_types: transformers' names that have been tested.
    """

    def __init__(self, *model_types: str) -> None:
        self.model_types: tuple[str, ...] = model_types

    def check_weights(self, config: Any, tensors: Mapping[str, SourceTensor]) -> None:
        """See `Family.check_weights`."""


GetModel = Callable[[], nn.Module]


class Family(Protocol):
    """One kind of model; see docs/howto/add_a_family.md."""

    model_types: tuple[str, ...]

    def training_length(self, config: Any) -> int | None:
        """Tokens the model was first trained on, before any extension."""
        ...

    def plan(
        self, config: Any, settings: LambdaConfig, model: GetModel | None = None
    ) -> AttentionPlan:
        """Describe the attention of every layer under these Λ settings.

        Args:
            config: the model's.
            settings: of the export.
            model: returns the model on the meta device, for a family that has to observe it;
                by default one is built.
        """
        ...

    def check_weights(self, config: Any, tensors: Mapping[str, SourceTensor]) -> None:
        """Raise ModelError if Λ-attention cannot compute a model of these tensors, by name."""
        ...

    def patched(self, model: nn.Module) -> AbstractContextManager[None]:
        """Open the model: within, attention arrives unrotated at `attend`."""
        ...


def lambda_layers(config: Any, num_kv_heads: int, settings: LambdaConfig) -> tuple[LayerSpec, ...]:
    """Describe the layers of a model that all see everything, at any length of text, by training.

    Raises:
        ConfigError: a setting for models whose rotation depends on the length of the text.
    """
    if settings.rope_regime is not None:
        raise ConfigError(
            f"rope_regime={settings.rope_regime}: no position of this {config.model_type} model "
            f"depends on the length of the text; leave it out"
        )
    layer = LayerSpec(
        num_kv_heads=num_kv_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        window_size=settings.window_size,
        num_sink_tokens=settings.num_sink_tokens,
        distance_limit=settings.distance_limit,
        ring_capacity=ring_capacity(settings.window_size, settings.chunk_size),
    )
    return (layer,) * config.num_hidden_layers


@dataclass(frozen=True)
class Turn:
    """A rotation a model asks for: its rotary module's path, and a layer type if it has many."""

    module: str
    layer_type: str | None = None


@dataclass(frozen=True)
class Visible:
    """Keys that a layer's mask shows: all earlier ones (None), or a window of this many."""

    window: int | None = None


@dataclass(frozen=True)
class AttentionCall:
    """One attention of one layer, as the model asks for it.

    Attributes:
        layer: its index.
        query: (B, H, S, D), not rotated.
        key: (B, G, S, D), not rotated.
        value: (B, G, S, D).
        scale: factor of the logits.
        turn: how queries and keys would have been rotated; None for not at all.
        visible: the keys that the layer's own mask shows.
        softcap: soft cap of the logits, 0 for none.
        sink_logits: (H,) learned logits, or None.
        key_bias: returns the (G, D) bias that every key holds, or None: see `bias_of_keys`.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    turn: Turn | None
    visible: Visible
    softcap: float
    sink_logits: Tensor | None
    key_bias: Callable[[], Tensor | None] = lambda: None


class Step(Protocol):
    """Answers the attention of one forward pass."""

    def attend(self, call: AttentionCall) -> Tensor:
        """Return (B, H, S, D)."""
        ...


_step: ContextVar[Step] = ContextVar("lminf_step")
_turn: ContextVar[Turn | None] = ContextVar("lminf_turn", default=None)


@contextmanager
def use_step(step: Step) -> Iterator[None]:
    """Answer every attention call within by this step."""
    token, turn = _step.set(step), _turn.set(None)
    try:
        yield
    finally:
        _step.reset(token)
        _turn.reset(turn)


def announce_turn(turn: Turn) -> None:
    """Say how the queries and keys of the next attention call are rotated."""
    _turn.set(turn)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Stand in for an attention function of transformers: (B, H, S, D) in, (B, S, H, D) out.

    transformers passes settings, such as dropout, that mean nothing here.
    """
    turn = _turn.get()
    _turn.set(None)
    call = AttentionCall(
        layer=module.layer_idx,  # type: ignore[arg-type]
        query=query,
        key=key,
        value=value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        turn=turn,
        visible=attention_mask if isinstance(attention_mask, Visible) else Visible(),
        softcap=softcap or 0.0,
        sink_logits=s_aux,
        key_bias=partial(bias_of_keys, module, key.shape[1], key.shape[3]),
    )
    output = _step.get().attend(call)
    return output.transpose(1, 2).contiguous(), None


def nothing(*_: Any, **__: Any) -> None:
    """Take the place of a function that builds a mask, a bias or a table of angles."""


def register_attention() -> None:
    """Make `attend` known to transformers under ATTENTION_NAME."""
    functions = Internals("all models").lookup("modeling_utils.ALL_ATTENTION_FUNCTIONS")
    functions.register(ATTENTION_NAME, attend)


def attention_name(config: Any) -> str:
    """Return the attention that transformers builds a model with, before it is patched.

    Older code picks a class by that name and knows its own names only. Families that replace the
    forward of that class need no name of ours.
    """
    is_replaced = config.model_type in REPLACED_FORWARDS and not runs_own_code(config)
    return "eager" if is_replaced else ATTENTION_NAME


def build_model(config: Any, dtype: torch.dtype, *, device: str) -> nn.Module:
    """Build a causal language model of transformers with our attention and random weights."""
    register_attention()
    experts = {"experts_implementation": EXPERTS_NAME} if register_experts(config) else {}
    with torch.device(device), model_errors(config):
        attention = attention_name(config)
        model = new_model(config, dtype=dtype, attn_implementation=attention, **experts)
    return model.eval()


@contextmanager
def model_errors(config: Any) -> Iterator[None]:
    """Say of which configuration transformers could not make, or run, a model."""
    try:
        yield
    except CODE_ERRORS as error:
        if isinstance(error, LminfError):
            raise
        raise ModelError(
            f"transformers cannot build a {shortened(config.model_type, 40)} model of this "
            f"config.json: {_unusable(config, error)}"
        ) from error


def _unusable(config: Any, error: BaseException) -> str:
    """Return in a few words why a configuration cannot be built."""
    padding, size = (getattr(config, name, None) for name in ("pad_token_id", "vocab_size"))
    if isinstance(padding, int) and isinstance(size, int) and not -size <= padding < size:
        return f"pad_token_id={padding} is outside its vocabulary of {size}; set it to null"
    return shortened(str(error) or type(error).__name__, 140)
