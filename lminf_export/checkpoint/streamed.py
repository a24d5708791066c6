"""A model of transformers that reads its weights while it runs, one layer at a time.

Its parameters stand on the meta device. A layer's are read from the checkpoint when the layer is
called and freed when it returns; of the embeddings only the rows that are looked up are kept; the
vocabulary projection is computed in blocks of its rows. So a whole stream passes through a model
of any size in the memory of its largest layer. The code that runs is the model's own.

Within a layer, the stream goes in blocks of tokens where a `Walk` is given: it is told of every
layer and block, and has to remember what a later block sees of an earlier one.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from lminf_export.checkpoint.opening import Checkpoint, model_settings
from lminf_export.errors import ModelError
from lminf_export.models.internals import replaced
from lminf_export.models.layer_stack import layer_lists
from lminf_export.models.remote_code import new_model, running_code_of, runs_own_code
from lminf_export.tensors.files import find_weights
from lminf_export.tensors.rows import fill, gather_rows, row_blocks
from lminf_export.tensors.stored import SourceTensor

AroundLayer: TypeAlias = Callable[[str, nn.Module, Callable[[], Any]], Any]

# Parameters outside of layers up to this size are read once.
_SMALL_BYTES = 32 * 2**20


class Walk(Protocol):
    """Told of every layer and block of tokens that a stream passes."""

    width: int

    def begin_layer(self) -> None:
        """Prepare for the first block of the next layer."""
        ...

    def begin_block(self, start: int, count: int) -> None:
        """Prepare for the layer's tokens start … start + count − 1."""
        ...

    def end_layer(self) -> None:
        """Forget what later blocks of this layer would have needed."""
        ...


class StreamedModel:
    """A causal language model whose weights may be read while it runs.

    Args:
        model: of transformers, in eval mode; it is changed and used up.
        sources: the tensors of those of its parameters that are on the meta device, by name.

    Attributes:
        model: the same model.
        around_layer: called in the place of every layer with its name, the layer, its weights
            read, and a function that runs it and returns its output; None to run it.
    """

    def __init__(self, model: Any, sources: Mapping[str, SourceTensor] | None = None) -> None:
        self.model = model
        self._sources = sources or {}
        self._pool: dict[Any, list[Tensor]] = defaultdict(list)
        self._walk: Walk | None = None
        self._kept: list[Tensor] = []  # the hidden state (T, H) that the projection received
        self._rows: Tensor | None = None  # those it receives now
        self._output: Any = None
        self.around_layer: AroundLayer | None = None
        self._open()

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, dtype: torch.dtype, attention: str | None = None
    ) -> StreamedModel:
        """Open a checkpoint.

        Args:
            checkpoint: the tensors. One of a parameter's own name is preferred to a tied one.
            dtype: in which the model computes.
            attention: name of its attention; None for the default of transformers.

        Raises:
            ModelError: the checkpoint does not fit the configuration.
        """
        model = _build(checkpoint, dtype, attention)
        return cls(model, _find_sources(model, checkpoint))

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor, walk: Walk | None = None) -> Tensor:
        """Return what the vocabulary projection receives for tokens (T,): (T, H).

        Of a batch of tokens (B, T) that is what it receives for the first of them.
        """
        self._walk, self._kept, self._rows = walk, [], None
        if walk is not None and not self._layers:
            walk.begin_layer()
            walk.begin_block(0, len(tokens))
        hook = self._base.register_forward_hook(self._keep_output)
        try:
            with running_code_of(self.model.config, self.model.dtype):
                self.model(input_ids=tokens.reshape(-1, tokens.shape[-1]), use_cache=False)
        finally:
            hook.remove()
        self._pool.clear()
        (hidden,) = self._kept
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (n, V) of some rows (n, H) of `hidden_states`.

        The model's own steps behind its projection are part of it.
        """
        self._rows = hidden
        token = torch.zeros(1, 1, dtype=torch.int64)
        own_code = running_code_of(self.model.config, self.model.dtype)
        with own_code, replaced(self._base, "forward", lambda *_, **__: self._output):
            logits: Tensor = self.model(input_ids=token, use_cache=False).logits[0]
        return logits

    @property
    def layer_bytes(self) -> int:
        """Bytes of the largest layer."""
        return max((sum(p.nbytes for p in x.parameters()) for x in self._layers), default=0)

    @property
    def _base(self) -> nn.Module:
        base: nn.Module = getattr(self.model, self.model.base_model_prefix)
        return base

    def _keep_output(self, _: nn.Module, __: Any, output: Any) -> None:
        """Keep the base model's output for `logits`, which need its form and not its content."""
        self._output = copy.copy(output)
        self._output["last_hidden_state"] = output["last_hidden_state"][:, -1:].clone()

    def _open(self) -> None:
        """Let every module find its parameters."""
        paths = layer_lists(self.model, self.model.config.num_hidden_layers)
        lists = [self.model.get_submodule(path) for path in paths]
        self._layers: list[nn.Module] = list(lists[0].children()) if len(lists) == 1 else []
        names = {module: name for name, module in self.model.named_modules()}
        inside = {module for layer in self._layers for module in layer.modules()}
        for layer in self._layers:
            self._open_layer(layer, names[layer])
        head: nn.Module = self.model.get_output_embeddings()
        head.register_forward_pre_hook(self._choose_rows)
        for module, name in names.items():
            own = {n: p for n, p in module.named_parameters(name, recurse=False) if p.is_meta}
            if not own or module in inside:
                continue
            if not all(n in self._sources for n in own):
                continue  # it is not called: see `_find_sources`
            if sum(p.nbytes for p in own.values()) <= _SMALL_BYTES:
                self._read({name: module})
            elif (
                module is head
                and isinstance(module, nn.Linear)
                and type(module).forward is nn.Linear.forward
            ):
                self._open_projection(module, name)
            elif isinstance(module, nn.Embedding):
                self._open_embedding(module, name)
            else:
                self._open_module(module, name)

    def _open_layer(self, layer: nn.Module, name: str) -> None:
        forward = layer.forward
        modules = dict(layer.named_modules(prefix=name))

        def whole(*args: Any, **kwargs: Any) -> Any:
            def run() -> Any:
                if self._walk is None:
                    return forward(*args, **kwargs)
                return _in_blocks(forward, args, kwargs, self._walk)

            with self._real(modules):
                return run() if self.around_layer is None else self.around_layer(name, layer, run)

        layer.forward = whole

    def _open_module(self, module: nn.Module, name: str) -> None:
        forward = module.forward

        def whole(*args: Any, **kwargs: Any) -> Any:
            with self._real({name: module}):
                return forward(*args, **kwargs)

        module.forward = whole

    def _open_embedding(self, module: nn.Embedding, name: str) -> None:
        """Look up in a table of the rows that are asked for."""
        forward, source = module.forward, self._sources[f"{name}.weight"]

        def looked_up(input: Tensor) -> Tensor:
            index, place = input.unique(return_inverse=True)
            meta, padding = module.weight, module.padding_idx
            rows = gather_rows(source, index, meta.dtype)
            module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
            module.padding_idx = None
            try:
                return forward(place)
            finally:
                module._parameters["weight"] = meta  # type: ignore[assignment]  # it is a parameter
                module.padding_idx = padding

        module.forward = looked_up  # type: ignore[method-assign]

    def _open_projection(self, module: nn.Linear, name: str) -> None:
        """Multiply by a block of rows at a time."""
        source, dtype = self._sources[f"{name}.weight"], module.weight.dtype
        bias = None
        if module.bias is not None:
            bias = torch.empty(module.bias.shape, dtype=dtype)
            fill(bias, self._sources[f"{name}.bias"])

        def projected(hidden: Tensor) -> Tensor:
            result = hidden.new_zeros(*hidden.shape[:-1], module.out_features)
            if self._rows is None:  # nobody reads logits while hidden states are computed
                return result
            for first, rows in row_blocks(source, dtype):
                part = result[..., first : first + len(rows)]
                own = None if bias is None else bias[first : first + len(rows)]
                part.copy_(nn.functional.linear(hidden, rows, own))
            return result

        module.forward = projected  # type: ignore[method-assign, assignment]

    def _choose_rows(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Keep what the projection receives, or give it other rows."""
        if self._rows is not None:
            return (self._rows[None],)
        self._kept.append(arguments[0][0])
        return (arguments[0][:, -1:],)

    @contextmanager
    def _real(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Give modules their parameters; take them away at the end."""
        before = [(m, n, p) for m in modules.values() for n, p in m._parameters.items()]
        self._read(modules)
        try:
            yield
        finally:
            for module, name, meta in before:
                real = module._parameters[name]
                module._parameters[name] = meta
                if real is not None and meta is not None and meta.is_meta:
                    self._pool[meta.shape, meta.dtype].append(real.data)

    def _read(self, modules: Mapping[str, nn.Module]) -> None:
        for path, module in modules.items():
            for name, meta in list(module._parameters.items()):
                if meta is None or not meta.is_meta:
                    continue
                free = self._pool[meta.shape, meta.dtype]
                real = free.pop() if free else torch.empty(meta.shape, dtype=meta.dtype)
                fill(real, self._sources[f"{path}.{name}" if path else name])
                module._parameters[name] = nn.Parameter(real, requires_grad=False)
        self._pool.clear()  # what a layer of another kind has left


def _build(checkpoint: Checkpoint, dtype: torch.dtype, attention: str | None) -> Any:
    """Build a model: parameters on the meta device, what is computed from the configuration not."""
    with _parameters_on_meta():
        model = new_model(checkpoint.source.config, **model_settings(checkpoint, dtype, attention))
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules that are made within keep their parameters' shapes and types only."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    with replaced(nn.Module, "register_parameter", on_meta):
        yield


@torch.no_grad()
def _find_sources(model: nn.Module, checkpoint: Checkpoint) -> dict[str, SourceTensor]:
    """Find the tensor of each parameter by its name; fill the buffers that are saved."""
    own = checkpoint.skeleton.conversion.apply(checkpoint.tensors)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[int, list[str]] = defaultdict(list)
    for name, parameter in parameters.items():
        tied[id(parameter)].append(name)
    names = {name: (name, *tied[id(parameter)]) for name, parameter in parameters.items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in parameters and name in own:
            if own[name].shape != tuple(tensor.shape):
                raise ModelError(
                    f"tensor {name}: the checkpoint has shape {list(own[name].shape)}, "
                    f"config.json asks for {list(tensor.shape)}"
                )
            fill(tensor, own[name])
    if runs_own_code(checkpoint.source.config):
        # Parts that are for training alone, as layers for several tokens at once, are not exported.
        names = {name: group for name, group in names.items() if any(x in own for x in group)}
    return find_weights(own, names, shapes)


def _in_blocks(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], walk: Walk
) -> Any:
    """Run a layer over its tokens in blocks; everything with an entry for each token is cut."""
    hidden = args[0] if args else kwargs["hidden_states"]
    length = hidden.shape[1]
    walk.begin_layer()
    result, others = [], None
    for start in range(0, length, walk.width):
        part = slice(start, min(start + walk.width, length))
        walk.begin_block(part.start, part.stop - part.start)
        own = {name: _cut(value, part, length) for name, value in kwargs.items()}
        output = forward(*(_cut(value, part, length) for value in args), **own)
        if isinstance(output, tuple):
            output, others = output[0], output[1:]
        result.append(output)
    walk.end_layer()
    whole = torch.cat(result, 1)
    return whole if others is None else (whole, *others)


def _cut(value: Any, part: slice, length: int) -> Any:
    """Cut a block of tokens out of a tensor (1, T, …) or (T,), or out of each of a tuple."""
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(x, part, length) for x in value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 1 and value.shape[0] == length:
        return value[part]
    if value.dim() > 1 and value.shape[:2] == (1, length):
        return value[:, part]
    return value
