"""Hunyuan: its norms of queries and keys come after the rotation, with a weight per dimension.

Rotation does not change a vector's length, so the norm's division commutes with it. The weights
commute with the rotation only if both dimensions of each pair have the same weight. Then the keys
are those of any rotary model. This depends on the checkpoint, so `check_weights` reads the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lminf_export.errors import ModelError
from lminf_export.models.base import AttentionPlan, GetModel
from lminf_export.models.rotary import RotaryFamily
from lminf_export.operator.settings import LambdaConfig
from lminf_export.tensors.stored import SourceTensor

_NORMS = ("query_layernorm.weight", "key_layernorm.weight")


class HunyuanFamily(RotaryFamily):
    """Adapter of Hunyuan models."""

    def is_length_dependent(self, rope: dict[str, Any]) -> bool:
        """Return False for `dynamic` with a fixed `alpha`, which Hunyuan is trained with."""
        return super().is_length_dependent(rope) and not rope.get("alpha")

    def plan(
        self, config: Any, settings: LambdaConfig, model: GetModel | None = None
    ) -> AttentionPlan:
        """Plan as any rotary model.

        Raises:
            ModelError: a scaling that makes rotated keys longer, which the norms would undo.
        """
        plan = super().plan(config, settings, model)
        if any(rotation.attention_factor != 1 for rotation in plan.rotations):
            raise ModelError(
                f"rotary scaling with an attention factor is not supported for {config.model_type}"
            )
        return plan

    def check_weights(self, config: Any, tensors: Mapping[str, SourceTensor]) -> None:
        """Check that weights of norms after the rotation are equal within each rotated pair.

        Raises:
            ModelError: they are not.
        """
        for name, tensor in tensors.items():
            if not name.endswith(_NORMS):
                continue
            weight = torch.cat(list(tensor.blocks()))
            first, second = weight.chunk(2)
            if not torch.equal(first, second):
                raise ModelError(
                    f"{name} of this {config.model_type} model weighs the two dimensions of a "
                    f"rotated pair differently, after the rotation: its logits depend on absolute "
                    f"positions, not on distances alone, so no attention by distance computes "
                    f"them and the text after the window would be wrong"
                )
