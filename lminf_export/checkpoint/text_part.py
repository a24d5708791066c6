"""The text model inside of a multimodal model: where its tensors are, and under which names.

The wrapper is built on the meta device by transformers' own class, which says how a checkpoint's
names are the wrapper's (old ones of the hub included) and which tensors are tied. The text model is
the one module in it that has exactly the tensors of the causal language model that is exported.
Tensors of the other modules are never read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lminf_export.checkpoint.conversion import Conversion
from lminf_export.errors import ModelError, shortened
from lminf_export.models.base import build_model
from lminf_export.models.transformers_tables import wrapper_class_name
from lminf_export.models.wrappers import (
    BESIDE_TEXT,
    MORE_ROWS,
    layers_of_text,
    reading_part,
    refusal,
)
from lminf_export.tensors.rows import FirstRows
from lminf_export.tensors.stored import SourceTensor

# Tokens that a wrapper may name in the place of its text model.
_TOKENS = ("bos_token_id", "eos_token_id")
# A vision tower of a library that reads images; none of its tensors is needed.
_OUTSIDE = "timm_wrapper"
# In the place of a path of layers that no text passes.
_LEFT_OUT = "left_out"
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class TextPart:
    """A text model in the model that wraps it.

    Attributes:
        wrapper: configuration of the whole model.
        config: of the text model, as a causal language model of its own; it ties its embeddings if
            the wrapper does, and stops at the wrapper's tokens.
        places: paths of the base model and of the vocabulary projection, in the wrapper and in the
            causal language model: (("model.language_model", "model"), ("lm_head", "lm_head")).
        embedding: name of the table of tokens in the wrapper.
        conversion: from a checkpoint's names and tensors to those of the text model in the wrapper.
    """

    wrapper: Any
    config: Any
    places: tuple[tuple[str, str], ...]
    embedding: str
    conversion: Conversion

    @property
    def model_type(self) -> str:
        """transformers' name of the wrapper."""
        name: str = self.wrapper.model_type
        return name

    def tensors(self, checkpoint: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
        """Return the text model's tensors by its own names; those of other modules are left out.

        Raises:
            ModelError: the checkpoint holds none of them.
        """
        found = self.conversion.apply(checkpoint)
        own = {
            self.own_name(name): self._of_vocabulary(name, found[name])
            for name in self.conversion.names & found.keys()
        }
        if not own:
            raise ModelError(
                f"the checkpoint holds no tensor of the text model of a {self.model_type} model, "
                f"such as {min(self.conversion.names)}; is it one?"
            )
        return own

    def _of_vocabulary(self, name: str, tensor: SourceTensor) -> SourceTensor:
        """Leave out the rows of a table that are for tokens of no text."""
        text, size = self.wrapper.get_text_config(decoder=True), self.config.vocab_size
        if text.model_type not in MORE_ROWS or name != self.embedding:
            return tensor
        return FirstRows(tensor, min(size, tensor.shape[0]))

    def own_name(self, name: str) -> str:
        """Return the name in the text model of one of its modules or tensors in the wrapper."""
        return _moved(name, self.places)

    def outer_name(self, name: str) -> str:
        """Return the name in the wrapper of a module or tensor of the text model."""
        return _moved(name, [(own, outer) for outer, own in self.places])

    def checkpoint_name(self, name: str) -> str | None:
        """Return the text model's name of a tensor as checkpoints or adapters name it, if any."""
        found = self.conversion.name_of(name)
        if found is None and self.outer_name(name) in self.conversion.names:
            return name  # of an adapter that was trained on the text model alone
        return None if found is None else self.own_name(found)

    def module_name(self, name: str) -> str | None:
        """Return the text model's name of a module as adapters name it, if it is one of its."""
        inner = [x.removeprefix(name) for x in self.conversion.names if x.startswith(f"{name}.")]
        return self.own_name(name) if inner else None


def find_text_part(config: Any, text: Any) -> TextPart:
    """Find the text model in the model that wraps it.

    Args:
        config: of the whole model, as transformers reads it.
        text: what `models.wrappers.text_config_of` makes of it.

    Raises:
        ModelError: transformers cannot build the wrapper, or it holds another text model.
    """
    wrapper = _build(reading_part(config))
    model: Any = build_model(text, torch.float32, device="meta")
    tensors = wrapper.state_dict(keep_vars=True)
    base = _find(wrapper, model, {name: tuple(x.shape) for name, x in tensors.items()})
    head = _head(wrapper, model, base)
    own_base, own_head = _path(model, model.base_model), _path(model, model.get_output_embeddings())
    layers = [(f"{base}.{outer}", f"{own_base}.{own}") for outer, own in _layers(config)]
    places = ((head, own_head), *layers, (base, own_base))
    embedding = f"{base}.{_path(model.base_model, model.get_input_embeddings())}.weight"
    text.tie_word_embeddings = tensors[embedding] is tensors[f"{head}.weight"]
    named = config.to_dict()
    for name in _TOKENS:
        if named.get(name) is not None:
            setattr(text, name, named[name])
    whole, own = Conversion.of(wrapper), model.state_dict()
    inside = {
        name: shape
        for name, shape in whole.shapes.items()
        if name.startswith((f"{base}.", f"{head}.")) and _moved(name, places) in own
    }
    conversion = Conversion(whole.transforms, inside, whole.prefix)
    return TextPart(config, text, places, embedding, conversion)


def _find(wrapper: Any, model: Any, shapes: Shapes) -> str:
    """Return the path in a wrapper of the module with a base model's tensors."""
    config, nearest = wrapper.config, None
    wanted = {name: tuple(x.shape) for name, x in model.base_model.state_dict().items()}
    kind, layers = config.get_text_config(decoder=True).model_type, _layers(config)
    beside = BESIDE_TEXT.get(kind)
    for path, _ in wrapper.named_modules():
        prefix = f"{path}." if path else ""
        found: Shapes = {}
        for name in (name.removeprefix(prefix) for name in shapes if name.startswith(prefix)):
            if not (beside and name.startswith(beside)) and not _is_left_out(name, layers):
                found[_moved(name, layers)] = shapes[prefix + name]
        if kind in MORE_ROWS:
            found |= {name: wanted[name] for name in found if _is_longer(found, wanted, name)}
        if found == wanted:
            return path
        difference = set(found.items()) ^ set(wanted.items())
        if nearest is None or len(difference) < len(nearest):
            nearest = difference
    name, shape = min(nearest or {("", ())})
    raise refusal(
        config.model_type,
        f"it is not a {model.config.model_type} model: they differ in {name} {list(shape)}",
    )


def _layers(config: Any) -> list[tuple[str, str]]:
    """Return the paths of layers in a wrapped base model and by itself, where these differ."""
    kept = layers_of_text(config)
    if kept is None:
        return []
    number = {outer: own for own, outer in enumerate(kept)}
    count = config.get_text_config(decoder=True).num_hidden_layers
    return [
        (f"layers.{layer}", f"layers.{number[layer]}" if layer in number else _LEFT_OUT)
        for layer in range(count)
    ]


def _is_left_out(name: str, layers: list[tuple[str, str]]) -> bool:
    return _moved(name, layers).startswith(_LEFT_OUT)


def _is_longer(found: Shapes, wanted: Shapes, name: str) -> bool:
    """Whether a table has the rows of another and more."""
    own = wanted.get(name, ())
    return found[name][1:] == own[1:] and len(own) == 2 and found[name][0] > own[0]


def _head(wrapper: Any, model: Any, base: str) -> str:
    """Return the path of the projection that belongs to a base model: the nearest one."""
    shapes = {name: tuple(x.shape) for name, x in wrapper.state_dict().items()}
    own = _path(model, model.get_output_embeddings())
    wanted = tuple(model.get_output_embeddings().weight.shape)
    parts = base.split(".")
    above = (".".join((*parts[:count], own)) for count in range(len(parts), -1, -1))
    path = next((x for x in above if f"{x}.weight" in shapes), None)
    if path is None or shapes[f"{path}.weight"] != wanted:
        found = "has no projection to the vocabulary"
        if path is not None:
            found = f"projects to {list(shapes[f'{path}.weight'])}, not {list(wanted)}"
        raise refusal(wrapper.config.model_type, f"{shortened(type(wrapper).__name__, 60)} {found}")
    return path


def _build(config: Any) -> nn.Module:
    """Build a wrapper on the meta device."""
    import transformers

    name = wrapper_class_name(config.model_type)
    if name is None:
        raise refusal(config.model_type, "its part that reads is of no type of transformers")
    with torch.device("meta"), without_outside_towers():
        model: nn.Module = getattr(transformers, name)(copy.deepcopy(config))
    return model.eval()


@contextmanager
def without_outside_towers() -> Iterator[None]:
    """Let wrappers be built without the towers for which another library would be needed."""
    from transformers import AutoModel

    build = AutoModel.from_config

    def built(config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(config, "model_type", None) == _OUTSIDE:
            return nn.Identity()
        return build(config, *args, **kwargs)

    own = vars(AutoModel).get("from_config")
    AutoModel.from_config = built
    try:
        yield
    finally:
        if own is None:
            del AutoModel.from_config
        else:
            AutoModel.from_config = own


def _path(model: nn.Module, wanted: nn.Module) -> str:
    """Return where a module is in a model.

    Raises:
        LookupError: nowhere.
    """
    found = [path for path, module in model.named_modules() if module is wanted]
    return found[0]


def _moved(name: str, places: Any) -> str:
    for path, other in places:
        if name == path or name.startswith(f"{path}."):
            return f"{other}{name[len(path) :]}"
    return name
