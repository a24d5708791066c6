"""Which layers of a model are alike? What each of them computes, written down, tells.

The whole model runs once on the meta device, where that costs little, and every operation that
reaches a tensor is written down in words that do not name the layer: weights and caches relative
to the layer they belong to, results by the place where they were made. Two layers with equal
records are one computation over other weights. Whatever sets a layer apart (a constant made from
its index, another window or rotation, experts) shows in its record, whether a configuration, a
module or a line of code is the reason. The first layers of the model then run alone, and have to
leave the same record as within the whole: then nothing they do depends on how many follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lminf_export.models.base import replaced
from lminf_export.operator import bindings

Words = tuple[Any, ...]

# A tensor that is no weight, no input and no result, such as a constant in a model's code.
_MOST_CONSTANT_ELEMENTS = 4096


class UnlikeLayersError(Exception):
    """Why a model's layers are traced one by one instead; never reaches a user."""


@dataclass(frozen=True)
class Record:
    """What a model computes, operation by operation.

    Attributes:
        before: ahead of its layers.
        layers: in each layer, in words that do not name it.
        after: behind them.
    """

    before: Words
    layers: tuple[Words, ...]
    after: Words


@dataclass(frozen=True)
class Twins:
    """How many layers have to be traced, and which of them stands for each of the others.

    Attributes:
        traced: the first so many layers show every kind there is.
        of_later: for each layer behind them one of them, not the first, that is alike.
    """

    traced: int
    of_later: tuple[int, ...]


def find_stack(model: nn.Module, num_layers: int) -> str:
    """Return the path of the list that holds a model's layers.

    Raises:
        UnlikeLayersError: there is no such list, or more than one.
    """
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    outermost = [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]
    if len(outermost) != 1:
        raise UnlikeLayersError(f"{len(outermost)} lists of {num_layers} modules in the model")
    return outermost[0]


@contextmanager
def shortened(model: nn.Module, path: str, count: int) -> Iterator[None]:
    """Leave a model only the first layers for a while."""
    parent, _, name = path.rpartition(".")
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    with replaced(model.get_submodule(parent), name, layers[:count]):
        yield


def find_twins(layers: Sequence[Words]) -> Twins:
    """Find the fewest first layers that show every later kind, in a place behind the first.

    The first layer stands for no other: what all layers share is made in it.

    Raises:
        UnlikeLayersError: every layer has to be traced.
    """
    for traced in range(2, len(layers)):
        place = {kind: layer for layer, kind in enumerate(layers[:traced]) if layer}
        if all(kind in place for kind in layers[traced:]):
            return Twins(traced, tuple(place[kind] for kind in layers[traced:]))
    raise UnlikeLayersError("the last of its layers is the first of its kind")


def check_first(first: Record, whole: Record) -> None:
    """Check that the first layers do alone what they do within the whole.

    Raises:
        UnlikeLayersError: something depends on how many layers there are.
    """
    for part in ("before", "after"):
        if getattr(first, part) != getattr(whole, part):
            raise UnlikeLayersError(f"what happens {part} the layers depends on how many there are")
    if first.layers != whole.layers[: len(first.layers)]:
        raise UnlikeLayersError("what a layer does depends on how many follow")


def record(
    wrapped: nn.Module, arguments: Mapping[str, Tensor], call: Sequence[Any], stack: str
) -> Record:
    """Run a model once and write down all it computes.

    Args:
        wrapped: the module that is traced.
        arguments: name → tensor of its inputs, on the meta device.
        call: the same as positional arguments.
        stack: path of the list of layers in it.

    Raises:
        UnlikeLayersError: its layers do not run once each, in order, one directly behind the
            other, with one tensor handed on.
    """
    layers = list(wrapped.get_submodule(stack).children())
    names = {id(tensor): name for name, tensor in arguments.items()}
    for name, tensor in (*wrapped.named_buffers(), *wrapped.named_parameters()):
        names[id(tensor)] = name
    recorder = _Recorder(names, stack, len(layers))
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            for handle in recorder.watch(index, layer):
                hooks.callback(handle.remove)
        with torch.no_grad(), recorder:
            wrapped(*call)
    return recorder.record()


class _Made(NamedTuple):
    """Where a tensor was made: section, number of the operation in it, which of its results."""

    section: int
    operation: int
    result: int


class _Recorder(TorchDispatchMode):
    """Writes down every operation. Section 0 is before the layers, i + 1 is layer i."""

    def __init__(self, names: Mapping[int, str], stack: str, num_layers: int) -> None:
        super().__init__()
        self.stack, self.after = stack, num_layers + 1
        self.sections: list[list[Any]] = [[] for _ in range(num_layers + 2)]
        self.section, self.finished = 0, 0
        self.names = names
        self.made: dict[int, _Made] = {}
        self.carried: dict[int, _Made] = {}
        self.strangers = 0
        self.alive: list[Any] = []  # an id belongs to one tensor while that lives

    def watch(self, index: int, layer: nn.Module) -> Iterator[Any]:
        """Be told when a layer begins and ends; yield the hooks."""
        yield layer.register_forward_pre_hook(lambda *_: self._enter(index))
        yield layer.register_forward_hook(lambda *_: self._leave(index))

    def record(self) -> Record:
        """Return what was written down."""
        before, *layers, after = (tuple(section) for section in self.sections)
        if self.finished != len(layers):
            raise UnlikeLayersError(f"only {self.finished} of {len(layers)} layers run")
        return Record(before, tuple(layers), after)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.section == self.finished and self.section:
            raise UnlikeLayersError(f"{func} runs between layers")
        words = (str(func), self._word(args), self._word(kwargs))
        if func._schema.is_mutable and not self._is_made_here((args, kwargs)):
            raise UnlikeLayersError(f"{func} changes what it was given")
        result = func(*args, **kwargs)
        place = len(self.sections[self.section])
        for number, tensor in enumerate(_tensors(result)):
            self.made[id(tensor)] = _Made(self.section, place, number)
        self.alive.append((args, kwargs, result))
        self.sections[self.section].append((*words, self._word(result)))
        return result

    def _enter(self, index: int) -> None:
        if index != self.finished or self.section > index:
            raise UnlikeLayersError("layers do not run once each, in order")
        self.section = index + 1

    def _leave(self, index: int) -> None:
        if self.section != index + 1:
            raise UnlikeLayersError("layers run inside one another")
        self.finished += 1
        if self.finished == self.after - 1:
            self.section = self.after

    def _is_made_here(self, values: Any) -> bool:
        found = (self.made.get(id(tensor)) for tensor in _tensors(values))
        return all(made is not None and made.section == self.section for made in found)

    def _word(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            form = str(value.dtype), tuple(value.shape), value.stride()
            return (*self._origin(value), *form)
        if isinstance(value, (list, tuple)):
            return tuple(map(self._word, value))
        if isinstance(value, dict):
            return tuple((key, self._word(value[key])) for key in sorted(value))
        return type(value).__name__, repr(value)  # 1, 1.0 and True are three things

    def _origin(self, tensor: Tensor) -> tuple[Any, ...]:
        made, name = self.made.get(id(tensor)), self.names.get(id(tensor))
        if made is not None:
            return self._place(made)
        if name is not None:
            return self._relative(name)
        if tensor.is_meta or tensor.numel() > _MOST_CONSTANT_ELEMENTS:
            self.strangers += 1
            return ("unknown", self.strangers)
        return ("constant", repr(tensor.tolist()))

    def _place(self, made: _Made) -> tuple[Any, ...]:
        if made.section == self.section:
            return ("here", made.operation, made.result)
        if made.section == 0 or made.section != self.section - 1:
            return ("there", *made)
        if self.carried.setdefault(self.section, made) != made:
            raise UnlikeLayersError("a layer hands more than one tensor to the next")
        return ("carried",)

    def _relative(self, name: str) -> tuple[Any, ...]:
        layer = self.section - 1
        for own in (f"{self.stack}.{layer}.", bindings.past_name(layer, "")):
            if name.startswith(own):
                return ("own", name.removeprefix(own))
        return ("named", name)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
