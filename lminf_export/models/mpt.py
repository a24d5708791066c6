"""MPT: ALiBi, and no attention interface.

Its attention modules get a forward of ours while the model is patched: project, attend, project
back. The bias table and the mask are not built at all, so neither their size nor a limit on it
(`max_seq_len`) reaches the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lminf_export.models.alibi import alibi_plan, alibi_slopes
from lminf_export.models.base import AnyWeights, AttentionPlan, GetModel, attend, nothing
from lminf_export.models.internals import Internals, code_of
from lminf_export.operator.settings import LambdaConfig

_INTERNALS = Internals("mpt models")


class MptFamily(AnyWeights):
    """Adapter of MPT."""

    def training_length(self, config: Any) -> int | None:
        """See `Family.training_length`."""
        return int(config.max_seq_len)

    def plan(
        self, config: Any, settings: LambdaConfig, model: GetModel | None = None
    ) -> AttentionPlan:
        """Apply Λ to every layer."""
        slopes = alibi_slopes(config.num_attention_heads)
        return alibi_plan(config, settings, slopes, notices=_mpt_notices(config))

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """Take bias table, mask and attention out of the model's own code."""
        code = code_of(model)
        with (
            _INTERNALS.replaced(code, "build_mpt_alibi_tensor", nothing),
            _INTERNALS.replaced(code, "create_causal_mask", _no_mpt_mask),
            _INTERNALS.replaced(_INTERNALS.member(code, "MptAttention"), "forward", _mpt_attention),
        ):
            yield


class _NoMask:
    """Takes the place of MPT's mask, which its code converts."""

    def to(self, *_: Any) -> None:
        return None


def _no_mpt_mask(*_: Any, **__: Any) -> _NoMask:
    return _NoMask()


def _mpt_attention(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Take the place of `MptAttention.forward`: queries, keys and values one after the other."""
    project, project_back, clip = _INTERNALS.members(self, "Wqkv", "out_proj", "clip_qkv")
    heads, head_dim, scale = _INTERNALS.members(self, "n_heads", "head_dim", "softmax_scale")
    fused = project(hidden_states)
    if clip:
        fused = fused.clamp(min=-clip, max=clip)
    fused = fused.unflatten(-1, (3, heads, head_dim))
    query, key, value = (x.transpose(1, 2) for x in fused.unbind(2))
    output, _weights = attend(self, query, key, value, None, scaling=scale)
    return project_back(output.flatten(2)), None


def _mpt_notices(config: Any) -> tuple[str, ...]:
    attention = config.attn_config
    ignored = {
        "alibi: false": not attention.alibi,
        f"alibi_bias_max: {attention.alibi_bias_max}": attention.alibi_bias_max != 8,
        "qk_ln: true": attention.qk_ln,
        "prefix_lm: true": attention.prefix_lm,
        "no_bias: false": not config.no_bias,
        f"logit_scale: {config.logit_scale}": config.logit_scale is not None,
    }
    names = ", ".join(name for name, present in ignored.items() if present)
    if not names:
        return ()
    return (
        f"transformers ignores {names} of this mpt model and so does this export: "
        f"check that it writes what the original model writes",
    )
