"""Ministral 3: its queries grow with the absolute position, by steps of the training length.

A query at position p is multiplied by 1 + β · log(1 + ⌊p / M⌋), M being
`original_max_position_embeddings`. A stream has no position that a model was trained for, and no
key in the window is further than the window. So the factor stays what it is for the first M
positions: 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from lminf_export.models.base import AttentionPlan, GetModel
from lminf_export.models.internals import Internals, codes_of
from lminf_export.models.rope_scaling import rope_parameters
from lminf_export.models.rotary import RotaryFamily
from lminf_export.operator.settings import LambdaConfig

_INTERNALS = Internals("ministral3 models")
_TEMPERATURE = "get_llama_4_attn_scale"


class Ministral3Family(RotaryFamily):
    """Adapter of Ministral 3 models."""

    def plan(
        self, config: Any, settings: LambdaConfig, model: GetModel | None = None
    ) -> AttentionPlan:
        """Plan as any rotary model, with a notice about the temperature."""
        plan = super().plan(config, settings, model)
        rope = rope_parameters(config)[0]
        length = rope["original_max_position_embeddings"]
        notice = (
            f"attention temperature grows from position {length} on, which a stream does not have: "
            f"it is frozen at 1, equal to the unmodified model for texts of up to "
            f"{min(length, settings.window_size)} tokens"
        )
        is_idle = not rope.get("llama_4_scaling_beta")
        return plan if is_idle else replace(plan, notices=(*plan.notices, notice))

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """See `Family.patched`."""
        with ExitStack() as stack:
            stack.enter_context(super().patched(model))
            stack.enter_context(_INTERNALS.replaced(codes_of(model)[0], _TEMPERATURE, _one))
            yield


class _One:
    """The factor 1, in the place of a tensor of factors."""

    def to(self, _: Any) -> float:
        return 1.0


def _one(*_: Any, **__: Any) -> _One:
    return _One()
