"""Attention that a repository's code writes out, recognised while it runs.

Such code multiplies rotated queries by rotated keys, scales and masks the products, takes a softmax
and multiplies by values; or it calls torch's own attention. A mode of torch sees every function
that the code calls. It follows queries and keys from their rotation, and gives the product with the
values to the step in force. Everything in between is still computed; nothing reads it.

Masks are not looked at, nor is the order in which keys are repeated for groups of heads: the probe
compares the result with the code as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lminf_export.errors import ModelError
from lminf_export.models.base import attend
from lminf_export.models.layer_stack import layer_lists

# Functions that give the same numbers in another arrangement or type.
_SAME = frozenset(
    (
        *("__getitem__", "narrow", "select", "split", "chunk", "squeeze", "unsqueeze"),
        *("view", "view_as", "reshape", "flatten", "unflatten", "contiguous", "clone", "detach"),
        *("transpose", "permute", "swapaxes", "movedim", "__get__"),
        *("expand", "expand_as", "repeat", "repeat_interleave"),
        *("to", "type", "type_as", "float", "half", "bfloat16", "double", "dropout"),
    )
)
_PRODUCTS = frozenset(("matmul", "__matmul__", "bmm"))
_TIMES = frozenset(("mul", "mul_", "__mul__", "__rmul__", "__imul__"))
_DIVIDED = frozenset(("div", "div_", "true_divide", "__truediv__", "__itruediv__"))
# Functions by which a mask gets into products of queries and keys.
_MASKED = frozenset(
    (
        *("add", "add_", "__add__", "__radd__", "__iadd__"),
        *("masked_fill", "masked_fill_", "where", "max", "maximum", "clamp_min", "nan_to_num"),
    )
)
# Exchanges of tokens and heads.
_EXCHANGES = {
    **dict.fromkeys(("transpose", "swapaxes"), ((1, 2), (2, 1))),
    "permute": ((0, 2, 1, 3), ((0, 2, 1, 3),)),
}
_FUSED = "scaled_dot_product_attention"


@dataclass(frozen=True)
class _Made:
    """A tensor that was made of another one.

    Attributes:
        tensor: it, kept so that its identity stays its own.
        source: the other.
        factor: by which it is larger.
        turns_layout: it is the other with tokens and heads exchanged.
    """

    tensor: Tensor
    source: Tensor
    factor: float = 1.0
    turns_layout: bool = False


@dataclass(frozen=True)
class _Products:
    """Queries times keys; after the softmax, the weights of values."""

    tensor: Tensor
    query: Tensor
    key: Tensor
    scale: float
    is_weights: bool = False


class WrittenAttention(TorchFunctionMode):
    """The mode; `begin_layer` and `rotated` tell it what it cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self._layer: int | None = None
        self._query: Tensor | None = None
        self._key: Tensor | None = None
        self._made: dict[int, _Made] = {}
        self._products: dict[int, _Products] = {}

    def begin_layer(self, layer: int) -> None:
        """Expect the attention of a layer."""
        self._layer = layer
        self._clear()

    def rotated(self, query: Tensor, key: Tensor) -> None:
        """Follow the queries and keys that were just rotated."""
        self._query, self._key = query, key

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == _FUSED:
            found = self._fused(*args, **kwargs)
        elif name in _PRODUCTS and len(args) == 2:
            found = self._product(args[0], args[1])
        else:
            found = None
        if found is not None:
            return found
        result = func(*args, **kwargs)
        self._follow(name, args, kwargs, result)
        if name in _PRODUCTS and len(args) == 2:
            self._keep_products(args[0], args[1], result)
        return result

    def _clear(self) -> None:
        """Forget the tensors of a layer."""
        self._query = self._key = None
        self._made, self._products = {}, {}

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        """Remember of what a tensor was made."""
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        results = result if isinstance(result, (tuple, list)) else (result,)
        made = [x for x in results if isinstance(x, Tensor)]
        if not tensors or not made:
            return
        products = next((self._products[id(x)] for x in tensors if id(x) in self._products), None)
        if products is not None:
            self._follow_products(name, args, kwargs, products, made[0])
            return
        factor = 1.0 if name in _SAME else _factor(name, args)
        if factor is None:
            return
        turns = name in _EXCHANGES and args[1:] in _EXCHANGES[name]
        for tensor in made:
            if tensor is not tensors[0]:
                self._made[id(tensor)] = _Made(tensor, tensors[0], factor, turns)

    def _follow_products(
        self, name: str, args: tuple[Any, ...], kwargs: Any, products: _Products, made: Tensor
    ) -> None:
        factor: float | None = 1.0
        is_weights = products.is_weights
        if name == "softmax" and not is_weights:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim not in (-1, made.dim() - 1):
                return
            is_weights = True
        elif name not in _SAME and (is_weights or name not in _MASKED):
            factor = None if is_weights else _factor(name, args)
        if factor is not None:
            query, key, scale = products.query, products.key, products.scale * factor
            self._products[id(made)] = _Products(made, query, key, scale, is_weights)

    def _keep_products(self, query: Tensor, key: Tensor, result: Tensor) -> None:
        left, right = self._origin(query, self._query), self._origin(key, self._key)
        if left is not None and right is not None:
            scale = left[1] * right[1]
            self._products[id(result)] = _Products(result, left[0], right[0], scale)

    def _product(self, weights: Tensor, value: Tensor) -> Tensor | None:
        """Answer a product of weights and values; None for any other product."""
        products = self._products.get(id(weights))
        if products is None or not products.is_weights:
            return None
        return self._attend(products.query, products.key, value, products.scale)

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: Any = None, **__: Any
    ) -> Tensor | None:
        left, right = self._origin(query, self._query), self._origin(key, self._key)
        if left is None or right is None:
            return None
        scale = (query.shape[-1] ** -0.5 if scale is None else scale) * left[1] * right[1]
        return self._attend(left[0], right[0], value, scale)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        place: Any = SimpleNamespace(layer_idx=self._layer)
        own = self._ungrouped(value, key)
        output, _ = attend(place, query, key, own, None, scaling=scale)
        self._clear()
        return output.transpose(1, 2)

    def _ungrouped(self, value: Tensor, key: Tensor) -> Tensor:
        """Return values with as many heads as keys have: before they were repeated for queries."""
        tensor: Tensor | None = value
        while tensor is not None:
            if tensor.dim() == 4 and tensor.shape[1] == key.shape[1]:
                return tensor
            made = self._made.get(id(tensor))
            tensor = None if made is None else made.source
        raise ModelError(
            "attention of its own: its values are arranged in a way that is not recognised"
        )

    def _origin(self, tensor: Any, origin: Tensor | None) -> tuple[Tensor, float] | None:
        """Return the (B, heads, S, D) tensor behind one, and the factor between them."""
        factor, last = 1.0, None
        while isinstance(tensor, Tensor) and tensor is not origin:
            last = self._made.get(id(tensor))
            if last is None:
                return None
            factor, tensor = factor * last.factor, last.source
        if tensor is not origin or origin is None or origin.dim() != 4:
            return None
        if last is not None and last.turns_layout:
            return last.tensor, factor
        return origin, factor


def _factor(name: str, args: tuple[Any, ...]) -> float | None:
    """Return by which number a function multiplies its tensor; None if it does something else."""
    numbers = [x for x in args if isinstance(x, (int, float)) and not isinstance(x, bool)]
    if len(args) != 2 or len(numbers) != 1:
        return None
    if name in _TIMES:
        return float(numbers[0])
    if name in _DIVIDED and numbers[0] is args[1] and numbers[0]:
        return 1 / float(numbers[0])
    return None


@contextmanager
def watching(model: nn.Module) -> Iterator[WrittenAttention]:
    """Recognise written-out attention of a model while the context lasts."""
    watch, config = WrittenAttention(), cast(Any, model.config)
    with ExitStack() as stack:
        for path in layer_lists(model, config.num_hidden_layers):
            for index, layer in enumerate(model.get_submodule(path).children()):

                def begin(_: nn.Module, __: Any, index: int = index) -> None:
                    watch.begin_layer(index)

                stack.callback(layer.register_forward_pre_hook(begin).remove)
        stack.enter_context(watch)
        yield watch
