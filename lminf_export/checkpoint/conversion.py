"""From the names a checkpoint has on the hub to those of transformers' own model, lazily.

transformers renames tensors while it loads them, and merges those of the experts into stacks.
Which, is its own table; here the same is described instead of done: a merged tensor is a list
of pieces of memory-mapped files, read in order when it is written, a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import nn

from lminf_export.errors import ModelError
from lminf_export.tensors.stored import InFiles, SourceTensor, StoredTensor


@dataclass(frozen=True)
class Stacked:
    """Tensors of one shape, one below the other along a new first dimension."""

    parts: tuple[SourceTensor, ...]

    def __post_init__(self) -> None:
        _require_equal_types(self.parts, [part.shape for part in self.parts])

    @property
    def dtype(self) -> str:
        """safetensors' name of the element type."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return (len(self.parts), *self.parts[0].shape)

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors."""
        return chain.from_iterable(part.blocks() for part in self.parts)

    def stored(self) -> list[StoredTensor] | None:
        """Return the parts of files that hold its bytes, if all of them lie in files."""
        return _in_files(self.parts)

    def at(self, index: int) -> SourceTensor:
        """Return the sub-tensor at an index of the first dimension."""
        return self.parts[index]


@dataclass(frozen=True)
class Joined:
    """Tensors concatenated along one of their dimensions."""

    parts: tuple[SourceTensor, ...]
    dim: int

    def __post_init__(self) -> None:
        rest = [(*p.shape[: self.dim], *p.shape[self.dim + 1 :]) for p in self.parts]
        _require_equal_types(self.parts, rest)

    @property
    def dtype(self) -> str:
        """safetensors' name of the element type."""
        return self.parts[0].dtype

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        first = self.parts[0].shape
        total = sum(part.shape[self.dim] for part in self.parts)
        return (*first[: self.dim], total, *first[self.dim + 1 :])

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors."""
        if self.dim == 0:
            return chain.from_iterable(part.blocks() for part in self.parts)
        rows = (self.at(index) for index in range(self.shape[0]))
        return chain.from_iterable(row.blocks() for row in rows)

    def stored(self) -> list[StoredTensor] | None:
        """Return the parts of files that hold its bytes, if whole ones follow one another."""
        return _in_files(self.parts) if self.dim == 0 else None

    def at(self, index: int) -> SourceTensor:
        """Return the sub-tensor at an index of the first dimension."""
        if self.dim:
            return Joined(tuple(part.at(index) for part in self.parts), self.dim - 1)
        for part in self.parts:
            if index < part.shape[0]:
                return part.at(index)
            index -= part.shape[0]
        raise IndexError(index)


@dataclass(frozen=True)
class Transposed:
    """A tensor with two dimensions exchanged; one matrix at a time is held in memory."""

    tensor: SourceTensor
    dim0: int
    dim1: int

    @property
    def dtype(self) -> str:
        """safetensors' name of the element type."""
        return self.tensor.dtype

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        shape = list(self.tensor.shape)
        shape[self.dim0], shape[self.dim1] = shape[self.dim1], shape[self.dim0]
        return tuple(shape)

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors."""
        if 0 in (self.dim0, self.dim1):
            whole = torch.cat(list(self.tensor.blocks())).reshape(self.tensor.shape)
            return iter([whole.transpose(self.dim0, self.dim1).flatten()])
        rows = (self.at(index) for index in range(self.shape[0]))
        return chain.from_iterable(row.blocks() for row in rows)

    def at(self, index: int) -> SourceTensor:
        """Return the sub-tensor at an index of the first dimension, which is not exchanged."""
        assert 0 not in (self.dim0, self.dim1)
        return Transposed(self.tensor.at(index), self.dim0 - 1, self.dim1 - 1)


def _in_files(parts: Sequence[SourceTensor]) -> list[StoredTensor] | None:
    found: list[StoredTensor] = []
    for part in parts:
        stored = part.stored() if isinstance(part, InFiles) else None
        if stored is None:
            return None
        found += stored
    return found


def _require_equal_types(parts: Sequence[SourceTensor], shapes: Sequence[tuple[int, ...]]) -> None:
    kinds = {(part.dtype, shape) for part, shape in zip(parts, shapes, strict=True)}
    if len(kinds) != 1:
        found = " and ".join(f"{dtype} {list(shape)}" for dtype, shape in sorted(kinds)[:2])
        raise ModelError(f"tensors that belong together differ: {found}")


Collected = dict[str, list[SourceTensor]]


@dataclass(frozen=True)
class Conversion:
    """What transformers does to a checkpoint's names and tensors when it loads a model.

    Attributes:
        transforms: its renamings and converters, in order.
        names: of the model's parameters.
        prefix: of the base model in them, such as "model".
    """

    transforms: tuple[Any, ...]
    names: frozenset[str]
    prefix: str

    @staticmethod
    def of(model: nn.Module) -> Conversion:
        """Ask transformers what it would do for a model."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        transforms = tuple(get_model_conversion_mapping(model))
        prefix: str = model.base_model_prefix  # type: ignore[assignment]  # of PreTrainedModel
        return Conversion(transforms, frozenset(model.state_dict()), prefix)

    def apply(self, checkpoint: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
        """Return a checkpoint under the model's names; what the model has not keeps its own.

        Raises:
            ModelError: tensors that are to be merged do not fit each other, or transformers
                asks for an operation that is not known here.
        """
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        known = dict.fromkeys(self.names, True)
        renamings = [t for t in self.transforms if not hasattr(t, "operations")]
        converters = [t for t in self.transforms if hasattr(t, "operations")]
        of_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
        converted: dict[str, SourceTensor] = {}
        merged: dict[str, tuple[Any, Collected]] = {}
        # Experts come in the order of their numbers, not of their digits.
        for name in sorted(checkpoint, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, self.prefix, known)
            if target not in known and name in known:
                target, pattern = name, None
            if target not in known:
                converted[name] = checkpoint[name]
            elif pattern is None:
                converted[target] = checkpoint[name]
            else:
                _, collected = merged.setdefault(target, (of_pattern[pattern], {}))
                collected.setdefault(pattern, []).append(checkpoint[name])
        for target, (converter, collected) in merged.items():
            converted[target] = _merge(target, converter, collected)
        return converted


def _merge(target: str, converter: Any, collected: Collected) -> SourceTensor:
    """Describe what a converter of transformers makes of the tensors collected for one target."""
    missing = [pattern for pattern in converter.source_patterns if pattern not in collected]
    if missing:
        raise ModelError(f"the checkpoint lacks {missing[0]!r}, a part of {target}")
    tensors = {pattern: collected[pattern] for pattern in converter.source_patterns}
    for operation in converter.operations:
        kind = type(operation).__name__
        if kind not in _OPERATIONS or len(converter.target_patterns) != 1:
            raise ModelError(
                f"tensor {target} of this checkpoint is made by {operation!r}, which is not "
                f"supported; save it with transformers' save_pretrained(…, "
                f"save_original_format=False) first"
            )
        try:
            tensors = _OPERATIONS[kind](operation, tensors)
        except ModelError as error:
            raise ModelError(f"tensor {target} cannot be put together: {error}") from error
    ((result,),) = tensors.values()
    return result


def _stack(operation: Any, tensors: Collected) -> Collected:
    if operation.dim != 0:
        raise ModelError(f"stacking along dimension {operation.dim} is not supported")
    return {pattern: [Stacked(tuple(parts))] for pattern, parts in tensors.items()}


def _concatenate(operation: Any, tensors: Collected) -> Collected:
    parts = tuple(chain.from_iterable(tensors.values()))
    return {"": [Joined(parts, operation.dim)]}


def _transpose(operation: Any, tensors: Collected) -> Collected:
    return {
        pattern: [Transposed(part, operation.dim0, operation.dim1) for part in parts]
        for pattern, parts in tensors.items()
    }


_OPERATIONS: dict[str, Callable[[Any, Collected], Collected]] = {
    "MergeModulelist": _stack,
    "Concatenate": _concatenate,
    "Transpose": _transpose,
}
