"""BLOOM: ALiBi, and no attention interface.

Its attention modules get a forward of ours while the model is patched: project, attend, project
back. The mask is not built, the bias is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lminf_export.errors import ModelError
from lminf_export.models.alibi import alibi_plan, alibi_slopes
from lminf_export.models.base import AnyWeights, AttentionPlan, GetModel, attend, nothing
from lminf_export.models.internals import Internals, code_of
from lminf_export.operator.settings import LambdaConfig

_INTERNALS = Internals("bloom models")


class BloomFamily(AnyWeights):
    """Adapter of BLOOM."""

    def training_length(self, config: Any) -> int | None:
        """See `Family.training_length`; the configuration does not give it."""
        return None

    def plan(
        self, config: Any, settings: LambdaConfig, model: GetModel | None = None
    ) -> AttentionPlan:
        """Apply Λ to every layer.

        Raises:
            ModelError: a setting under which transformers computes something else.
        """
        if config.slow_but_exact and config.pretraining_tp > 1:
            raise ModelError(
                "slow_but_exact=true of this bloom model: transformers then leaves out biases the "
                "model was trained with; set it to false in config.json"
            )
        return alibi_plan(config, settings, alibi_slopes(config.num_attention_heads))

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """Take mask and attention out of the model's own code; its bias is not read then."""
        code = code_of(model)
        with (
            _INTERNALS.replaced(code, "create_causal_mask", nothing),
            _INTERNALS.replaced(
                _INTERNALS.member(code, "BloomAttention"), "forward", _bloom_attention
            ),
        ):
            yield


def _bloom_attention(
    self: Any, hidden_states: Tensor, residual: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Take the place of `BloomAttention.forward`: query, key and value of a head side by side."""
    project, dense, heads = _INTERNALS.members(self, "query_key_value", "dense", "num_heads")
    head_dim, scale = _INTERNALS.members(self, "head_dim", "inv_norm_factor")
    fused = project(hidden_states).unflatten(-1, (heads, 3, head_dim))
    query, key, value = (x.transpose(1, 2) for x in fused.unbind(3))
    output, _weights = attend(self, query, key, value, None, scaling=scale)
    return residual + dense(output.flatten(2)), None
