"""Collecting and checking the tensors of a quantised format, shared by all formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lminf_export.errors import ModelError
from lminf_export.tensors.stored import RawTensor, SourceTensor


@dataclass
class Found:
    """The dequantised tensors of a checkpoint.

    Attributes:
        tensors: name in the model → the tensor, dequantised.
        used: names in the checkpoint of their parts, and of tensors that are not needed any more.
    """

    tensors: dict[str, SourceTensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def add(self, target: str, tensor: SourceTensor, *parts: str) -> None:
        """Put a tensor in the place of its parts."""
        self.tensors[target] = tensor
        self.used.update(parts)

    def check(self, fits: bool, name: str, other: str, checkpoint: Mapping[str, RawTensor]) -> None:
        """Raise ModelError if two parts of a tensor do not fit each other."""
        if not fits:
            both = " and ".join(
                f"{x} is {checkpoint[x].dtype} {list(checkpoint[x].shape)}" for x in (name, other)
            )
            raise ModelError(
                f"quantised tensors that belong together do not fit: {both}; check that the "
                f"checkpoint is complete and its quantization_config its own"
            )


def require(checkpoint: Mapping[str, RawTensor], name: str, owner: str) -> RawTensor:
    """Return a part of a quantised tensor.

    Raises:
        ModelError: it is not there.
    """
    if name not in checkpoint:
        raise ModelError(
            f"the checkpoint lacks {name!r}, without which {owner!r} cannot be decoded"
        )
    return checkpoint[name]
