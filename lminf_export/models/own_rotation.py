"""Rotations of models whose code is their repository's own, read from its classes as they are.

Such a class may take any arguments, and may be called with positions or with a length. So the model
is built once more, with its rotary modules on the CPU, where their frequencies are numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lminf_export.errors import ModelError
from lminf_export.models.base import Rotation, build_model
from lminf_export.models.interception import APPLY_ROTATION
from lminf_export.models.internals import codes_of, replaced
from lminf_export.models.pairing import find_pairing

_FREQUENCIES, _FACTOR = "inv_freq", "attention_scaling"
# Rows of the tables that a class is asked for; more than `find_pairing` reads.
_LENGTH = 16


def own_rotation(model: nn.Module, config: Any, path: str) -> Rotation:
    """Read the rotation of one of a model's rotary modules.

    Args:
        model: on the meta device.
        config: its configuration.
        path: of the rotary module.

    Raises:
        ModelError: the class has no frequencies, or turns in a way that is not recognised.
    """
    with _on_the_cpu({type(model.get_submodule(path))}):
        module: Any = build_model(config, torch.float32, device="meta").get_submodule(path)
    frequencies = getattr(module, _FREQUENCIES, None)
    if not isinstance(frequencies, Tensor) or frequencies.is_meta or frequencies.dim() != 1:
        raise ModelError(
            f"rotation of its own: {type(module).__name__} keeps no {_FREQUENCIES}, the frequency "
            f"of each pair, so its keys could not be re-positioned"
        )
    inv_freq, factor = frequencies.float(), float(getattr(module, _FACTOR, 1.0))
    pairing = find_pairing(_rotating(module, apply_of(model)), inv_freq, factor)
    return Rotation(pairing.sign * inv_freq, factor, pairing.interleaved)


def apply_of(model: nn.Module) -> Callable[..., Any]:
    """Return the function that rotates, as the attention module sees it."""
    attentions = [part for part in model.modules() if hasattr(part, "layer_idx")]
    for part in (*attentions, model):
        for code in codes_of(part):
            found: Callable[..., Any] | None = getattr(code, APPLY_ROTATION, None)
            if found is not None:
                return found
    raise ModelError(f"rotation of its own: it has no function {APPLY_ROTATION}")


def _rotating(module: Any, apply: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that turns vectors by positions, however the code takes these."""
    takes = inspect.signature(module.forward).parameters
    by_length = "position_ids" not in takes and "seq_len" in takes
    wanted = inspect.signature(apply).parameters.get("position_ids")
    gives_position = wanted is not None and (by_length or wanted.default is wanted.empty)

    @torch.no_grad()
    def rotated(x: Tensor, position: Tensor) -> Tensor:
        angles = module(x, seq_len=_LENGTH) if by_length else module(x, position)
        result: Tensor = apply(x, x, *angles, *((position,) if gives_position else ()))[0]
        return result

    return rotated


@contextmanager
def _on_the_cpu(classes: set[type]) -> Iterator[None]:
    """Let modules of these classes compute what they hold on the CPU while they are made."""

    def made(initialise: Callable[..., None]) -> Callable[..., None]:
        def on_the_cpu(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            with torch.device("cpu"):
                initialise(self, *args, **kwargs)

        return on_the_cpu

    with ExitStack() as stack:
        for cls in classes:
            stack.enter_context(replaced(cls, "__init__", made(cls.__init__)))  # type: ignore[misc]
        yield
