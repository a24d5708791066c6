"""A model of transformers without numbers: the names, shapes and ties of its tensors.

An export and a validation read it in many places. It is built when the first of them asks, and
once: a job hands one `Skeleton` from step to step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lminf_export.checkpoint.conversion import Conversion
from lminf_export.models.base import build_model


@dataclass(frozen=True, eq=False)
class Skeleton:
    """The model of a configuration on the meta device, built on first use.

    Only the element types of `tensors` depend on `dtype`. Names, shapes, ties, the conversion and
    the attention calls do not, so a job that traces gives the bundle's dtype and uses the same
    skeleton for all.

    Attributes:
        config: the configuration of transformers.
        dtype: of the floating-point parameters.
    """

    config: Any
    dtype: torch.dtype = torch.float32

    @cached_property
    def model(self) -> nn.Module:
        """The model, with the attention and the experts that are traced.

        Raises:
            ModelError: transformers cannot build a model of this configuration.
        """
        return build_model(self.config, self.dtype, device="meta")

    @cached_property
    def conversion(self) -> Conversion:
        """From a checkpoint's names and tensors to the model's."""
        return Conversion.of(self.model)

    @cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Every parameter and saved buffer by name; tied ones under each of their names."""
        return self.model.state_dict(keep_vars=True)

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The names of each tensor, in the model's order; tied tensors have several."""
        names: dict[int, list[str]] = {}
        for name, tensor in self.tensors.items():
            names.setdefault(id(tensor), []).append(name)
        return tuple(tuple(group) for group in names.values())

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """The groups of more than one name."""
        return tuple(group for group in self.groups if len(group) > 1)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def of(self, config: Any) -> Skeleton:
        """Return the skeleton of another configuration of the same model, or this one.

        Only whether embeddings are tied may differ: an adapter and quantisation can change it.
        """
        ties = [getattr(x, "tie_word_embeddings", None) for x in (config, self.config)]
        return self if ties[0] == ties[1] else replace(self, config=config)
