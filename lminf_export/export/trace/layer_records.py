"""Finds layers that compute the same over different weights, by recording their operations.

The whole model runs once on the meta device, where that costs little. Every operation on a tensor
is recorded, and the operations of a layer form its signature. A signature does not name its layer:
weights and caches are named relative to the layer they belong to, results by the operation that
made them. Layers with equal signatures are the same computation over different weights. Whatever
makes a layer different (a constant made from its index, another window or rotation, experts) is
part of its signature, whether the cause is the configuration, a module or a line of code. The
first layers of the model then run alone and must give the same record as within the whole model;
that shows that nothing in them depends on the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lminf_export.models.internals import replaced
from lminf_export.models.layer_stack import layer_lists
from lminf_export.operator import bindings

Signature = tuple[Any, ...]

# Of a constant in a model's code: a tensor that is no weight, no input and no result.
_MOST_CONSTANT_ELEMENTS = 4096


class UnlikeLayersError(Exception):
    """The layers must be traced one by one; says why. Caught in `trace`, never shown to users."""


@dataclass(frozen=True)
class LayerRecords:
    """The operations of a model, in order.

    Attributes:
        before: operations before the first layer.
        layers: signature of each layer.
        after: operations after the last layer.
    """

    before: Signature
    layers: tuple[Signature, ...]
    after: Signature


@dataclass(frozen=True)
class Templates:
    """How many layers have to be traced, and which of them is the template of each other layer.

    Attributes:
        traced: number of first layers that are traced; they have every signature there is.
        of_later: for each layer after them, the index of the traced layer, never 0, with the same
            signature.
    """

    traced: int
    of_later: tuple[int, ...]


def find_stack(model: nn.Module, num_layers: int) -> str:
    """Return the path of the list that holds a model's layers.

    Raises:
        UnlikeLayersError: there is no such list, or more than one.
    """
    found = layer_lists(model, num_layers)
    if len(found) != 1:
        raise UnlikeLayersError(f"{len(found)} lists of {num_layers} modules in the model")
    return found[0]


@contextmanager
def shortened(model: nn.Module, path: str, count: int) -> Iterator[None]:
    """Cut a model behind its first layers, within the context."""
    parent, _, name = path.rpartition(".")
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    with replaced(model.get_submodule(parent), name, layers[:count]):
        yield


def find_templates(layers: Sequence[Signature]) -> Templates:
    """Find the smallest number of first layers that have the signature of every later layer.

    Layer 0 is no template: values that all layers share are computed in it.

    Raises:
        UnlikeLayersError: every layer has to be traced.
    """
    for traced in range(2, len(layers)):
        place = {kind: layer for layer, kind in enumerate(layers[:traced]) if layer}
        if all(kind in place for kind in layers[traced:]):
            return Templates(traced, tuple(place[kind] for kind in layers[traced:]))
    raise UnlikeLayersError("the last of its layers is the first of its kind")


def check_first(first: LayerRecords, whole: LayerRecords) -> None:
    """Check that the first layers compute alone what they compute within the whole model.

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
) -> LayerRecords:
    """Run a model once and record its operations.

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
    """Where a tensor was made: section, index of the operation in it, index of the result."""

    section: int
    operation: int
    result: int


class _Recorder(TorchDispatchMode):
    """Records every operation. Section 0 is before the layers, section i + 1 is layer i."""

    def __init__(self, names: Mapping[int, str], stack: str, num_layers: int) -> None:
        super().__init__()
        self.stack, self.after = stack, num_layers + 1
        self.sections: list[list[Any]] = [[] for _ in range(num_layers + 2)]
        self.section, self.finished = 0, 0
        self.names = names
        self.made: dict[int, _Made] = {}
        self.carried: dict[int, _Made] = {}
        self.unknown = 0
        self.alive: list[Any] = []  # keeps tensors alive: the id of a freed one is used again

    def watch(self, index: int, layer: nn.Module) -> Iterator[Any]:
        """Register hooks on a layer that follow where it begins and ends; yield their handles."""
        yield layer.register_forward_pre_hook(lambda *_: self._enter(index))
        yield layer.register_forward_hook(lambda *_: self._leave(index))

    def record(self) -> LayerRecords:
        """Return the record of the run."""
        before, *layers, after = (tuple(section) for section in self.sections)
        if self.finished != len(layers):
            raise UnlikeLayersError(f"only {self.finished} of {len(layers)} layers run")
        return LayerRecords(before, tuple(layers), after)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.section == self.finished and self.section:
            raise UnlikeLayersError(f"{func} runs between layers")
        call = (str(func), self._describe(args), self._describe(kwargs))
        if func._schema.is_mutable and not self._is_made_here((args, kwargs)):
            raise UnlikeLayersError(f"{func} changes what it was given")
        result = func(*args, **kwargs)
        place = len(self.sections[self.section])
        for number, tensor in enumerate(_tensors(result)):
            self.made[id(tensor)] = _Made(self.section, place, number)
        self.alive.append((args, kwargs, result))
        self.sections[self.section].append((*call, self._describe(result)))
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

    def _describe(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            form = str(value.dtype), tuple(value.shape), value.stride()
            return (*self._origin(value), *form)
        if isinstance(value, (list, tuple)):
            return tuple(map(self._describe, value))
        if isinstance(value, dict):
            return tuple((key, self._describe(value[key])) for key in sorted(value))
        return type(value).__name__, repr(value)  # 1, 1.0 and True are three things

    def _origin(self, tensor: Tensor) -> tuple[Any, ...]:
        made, name = self.made.get(id(tensor)), self.names.get(id(tensor))
        if made is not None:
            return self._place(made)
        if name is not None:
            return self._relative(name)
        if tensor.is_meta or tensor.numel() > _MOST_CONSTANT_ELEMENTS:
            self.unknown += 1
            return ("unknown", self.unknown)
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
