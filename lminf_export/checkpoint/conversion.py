"""From the names and tensors of a checkpoint on the hub to those of transformers' model, lazily.

transformers renames tensors while it loads them, and merges those of the experts into stacks, by a
table of its own. The classes here describe the result instead of computing it: a merged tensor
holds the tensors it is made of, and reads them in the order of its own elements, a block at a
time, when it is written.

Example, mixtral: E experts with `w1` (I, H) and `w3` (I, H) become `gate_up_proj` (E, 2I, H):
MergeModulelist stacks each of the two to (E, I, H), Concatenate joins the stacks along dimension 1.
In the order of elements that is w1 of expert 0, w3 of expert 0, w1 of expert 1 …
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import nn

from lminf_export.errors import ModelError
from lminf_export.models.internals import Internals
from lminf_export.tensors.stored import InFiles, SourceTensor, StoredTensor


@dataclass(frozen=True)
class Stacked:
    """Tensors of one shape S, stacked along a new first dimension: (n, *S)."""

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
        # Row i of the result is row i of every part, joined along a dimension that is one lower;
        # `at` descends until that dimension is the first, where whole parts follow one another.
        rows = (self.at(index) for index in range(self.shape[0]))
        return chain.from_iterable(row.blocks() for row in rows)

    def stored(self) -> list[StoredTensor] | None:
        """Return the parts of files that hold its bytes in order; None if parts interleave."""
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
    """A tensor with two dimensions exchanged.

    Of a stack (E, out, in) with dimensions 1 and 2 exchanged, one matrix at a time is in memory; a
    matrix is read whole, since its transpose begins with an element of every row.
    """

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


_INTERNALS = Internals("all checkpoints")
Collected = dict[str, list[SourceTensor]]


@dataclass(frozen=True)
class Conversion:
    """The renaming and merging that transformers applies to a checkpoint when it loads a model.

    Attributes:
        transforms: transformers' renamings (names only) and converters (several tensors into one,
            with a list of operations), in their order.
        shapes: of the model's parameters and buffers, by name.
        prefix: name of the base model within the model, such as "model".
    """

    transforms: tuple[Any, ...]
    shapes: Mapping[str, tuple[int, ...]]
    prefix: str

    @staticmethod
    def of(model: nn.Module) -> Conversion:
        """Read transformers' table for a model."""
        mapping = _INTERNALS.lookup("conversion_mapping.get_model_conversion_mapping")
        transforms = tuple(mapping(model))
        prefix: str = model.base_model_prefix  # type: ignore[assignment]  # of PreTrainedModel
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return Conversion(transforms, shapes, prefix)

    @property
    def names(self) -> Set[str]:
        """Names of the model's parameters and buffers."""
        return self.shapes.keys()

    def apply(self, checkpoint: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
        """Return a checkpoint under the model's names; tensors unknown to the model keep theirs.

        Raises:
            ModelError: tensors that are to be merged do not fit each other, or transformers
                asks for an operation that is not known here.
        """
        dot_natural_key = _INTERNALS.lookup("core_model_loading.dot_natural_key")
        of_pattern = {pattern: t for t in self._converters for pattern in t.source_patterns}
        converted: dict[str, SourceTensor] = {}
        merged: dict[str, tuple[Any, Collected]] = {}
        # `of_pattern`: the pattern of a converter that a name matched → that converter.
        # `merged`: target name → its converter, and the tensors found so far for each pattern.
        # Sorted by number ("experts.10" after "experts.9"): stacks are in the order of collection.
        for name in sorted(checkpoint, key=dot_natural_key):
            target, pattern = self._renamed(name)
            if target not in self.names:
                converted[name] = checkpoint[name]  # `find_weights` never asks for it
            elif pattern is None:
                converted[target] = checkpoint[name]
            else:
                _, collected = merged.setdefault(target, (of_pattern[pattern], {}))
                collected.setdefault(pattern, []).append(checkpoint[name])
        for target, (converter, collected) in merged.items():
            converted[target] = _merge(target, self.shapes[target], converter, collected)
        return converted

    @cached_property
    def _renamings(self) -> list[Any]:
        return [t for t in self.transforms if not hasattr(t, "operations")]

    @cached_property
    def _converters(self) -> list[Any]:
        return [t for t in self.transforms if hasattr(t, "operations")]

    @cached_property
    def _known(self) -> dict[str, bool]:
        return dict.fromkeys(self.shapes, True)

    def name_of(self, name: str) -> str | None:
        """Return the model's name of a checkpoint's tensor; None of an unknown or merged one."""
        target, pattern = self._renamed(name)
        return target if target in self.names and pattern is None else None

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """Return a tensor's name in the model, and the pattern of the converter that takes it."""
        rename_source_key = _INTERNALS.lookup("core_model_loading.rename_source_key")
        target, pattern = rename_source_key(
            name, self._renamings, self._converters, self.prefix, self._known
        )
        if target not in self.names and name in self.names:
            return name, None  # saved under the model's own names already
        return target, pattern


def _merge(
    target: str, shape: tuple[int, ...], converter: Any, collected: Collected
) -> SourceTensor:
    """Describe the tensor that a converter of transformers makes of those collected for it.

    Args:
        target: its name.
        shape: that the model has it in.
        converter: of transformers.
        collected: for each pattern of the converter, the tensors whose names match it.
    """
    missing = [pattern for pattern in converter.source_patterns if pattern not in collected]
    if missing:
        raise ModelError(f"the checkpoint lacks {missing[0]!r}, a part of {target}")
    # In the converter's order, which is the order of concatenation (gate before up).
    tensors = {pattern: collected[pattern] for pattern in converter.source_patterns}
    for operation in converter.operations:
        kind = type(operation).__name__
        if kind not in _OPERATIONS or len(converter.target_patterns) != 1:
            raise ModelError(
                f"tensor {target} of this checkpoint is made by {operation!r}, which is not "
                f"supported; save it with transformers' save_pretrained(…, "
                f"save_original_format=False) first"
            )
        if getattr(operation, "check_dims", False) and _have_shape(tensors, shape):
            continue  # some files hold it as the model has it, some turned
        try:
            tensors = _OPERATIONS[kind](operation, tensors)
        except ModelError as error:
            raise ModelError(f"tensor {target} cannot be put together: {error}") from error
    ((result,),) = tensors.values()
    return result


def _have_shape(tensors: Collected, shape: tuple[int, ...]) -> bool:
    return all(part.shape == shape for parts in tensors.values() for part in parts)


def _stack(operation: Any, tensors: Collected) -> Collected:
    """MergeModulelist: for each pattern, E tensors of shape S → one (E, *S)."""
    if operation.dim != 0:
        raise ModelError(f"stacking along dimension {operation.dim} is not supported")
    return {pattern: [Stacked(tuple(parts))] for pattern, parts in tensors.items()}


def _concatenate(operation: Any, tensors: Collected) -> Collected:
    """Concatenate: the tensors of all patterns → one, longer along `operation.dim`."""
    parts = tuple(chain.from_iterable(tensors.values()))
    return {"": [Joined(parts, operation.dim)]}


def _transpose(operation: Any, tensors: Collected) -> Collected:
    """Transpose: each tensor by itself, for example (E, out, in) → (E, in, out)."""
    return {
        pattern: [Transposed(part, operation.dim0, operation.dim1) for part in parts]
        for pattern, parts in tensors.items()
    }


_OPERATIONS: dict[str, Callable[[Any, Collected], Collected]] = {
    "MergeModulelist": _stack,
    "Concatenate": _concatenate,
    "Transpose": _transpose,
}
