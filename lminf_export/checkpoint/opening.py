"""A model's tensors as they are exported: read, decoded where quantised, an adapter merged."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lminf_export.checkpoint.conversion import Conversion
from lminf_export.checkpoint.dequantize import methods
from lminf_export.checkpoint.lora.adapter import (
    Adapter,
    changed_tensors,
    merge,
    read_adapter,
)
from lminf_export.checkpoint.source import Source
from lminf_export.errors import ModelError
from lminf_export.models.base import build_model, register_attention
from lminf_export.tensors.files import find_weights, read_checkpoint
from lminf_export.tensors.stored import SourceTensor


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors as they are written into a bundle.

    Attributes:
        source: the model; its configuration is that of the tensors, so with an adapter that
            changes one of two tied tensors it ties them no longer.
        tensors: by name.
        adapter: name of the adapter that is merged, or None.
        notices: lines for the user.
    """

    source: Source
    tensors: dict[str, SourceTensor]
    adapter: str | None
    notices: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the tensors are those of the files."""
        return self.adapter is None and self.source.quantization is None


def open_checkpoint(
    source: Source,
    adapter: str | Path | None = None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Read the list of a model's tensors.

    Args:
        source: the model.
        adapter: folder of a PEFT LoRA adapter to merge.
        allow_pickle: read `.bin` files where there are no safetensors.
        trust_remote_code: as for the model.

    Raises:
        ModelError: a file is missing or damaged, of a kind that is not read, or the adapter is
            not one of this model.
    """
    found = read_adapter(adapter, allow_pickle=allow_pickle) if adapter is not None else None
    raw = read_checkpoint(source.folder, allow_pickle=allow_pickle)
    tensors = methods.dequantize_checkpoint(raw, source.quantization)
    notices = (methods.notice(source.quantization),) if source.quantization else ()
    if found is None:
        return Checkpoint(source, tensors, None, notices)
    model = _skeleton(source.config, trust_remote_code)
    untied = _untied_names(found, model)
    if untied:
        config = copy.deepcopy(source.config)
        config.tie_word_embeddings = False
        source = replace(source, config=config, is_untied=True)
        model = _skeleton(config, trust_remote_code)
        _split(tensors, untied, model, found)
        notices = (*notices, f"adapter {found.name!r} unties {' and '.join(untied)}")
    tensors = merge(found, tensors, model, source.name)
    return Checkpoint(source, tensors, found.name, notices)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, attention: str | None) -> Any:
    """Load a checkpoint into a model of transformers.

    Args:
        checkpoint: the tensors to load.
        dtype: of its parameters.
        attention: name of its attention; None for the default of transformers.

    Raises:
        ModelError: the checkpoint does not fit the configuration.
    """
    from transformers import AutoModelForCausalLM

    register_attention()
    source = checkpoint.source
    settings = {
        "dtype": dtype,
        "attn_implementation": attention,
        "experts_implementation": "eager",  # the only one that takes float64, and the plainest
    }
    if checkpoint.is_plain and any(source.folder.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(
            source.folder, use_safetensors=True, **settings
        ).eval()
    model = AutoModelForCausalLM.from_config(copy.deepcopy(source.config), **settings)
    _fill(model, checkpoint.tensors)
    return model.eval()


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, SourceTensor]) -> None:
    """Copy tensors into a model's, block by block."""
    own = Conversion.of(model).apply(tensors)
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    wanted = {group[0]: tuple(group) for group in names.values()}
    shapes = {name: tuple(state[name].shape) for name in wanted}
    for name, tensor in find_weights(own, wanted, shapes).items():
        place, start = state[name].data.view(-1), 0
        for block in tensor.blocks():
            place[start : start + block.numel()] = block
            start += block.numel()


def _skeleton(config: Any, trust_remote_code: bool) -> nn.Module:
    return build_model(config, torch.float32, device="meta", trust_remote_code=trust_remote_code)


def _untied_names(adapter: Adapter, model: nn.Module) -> tuple[str, ...]:
    """Return the names of a tied tensor that the adapter changes under one of them only."""
    if adapter.settings.get("ensure_weight_tying"):
        return ()
    changed = changed_tensors(adapter, model)
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    tied = [names for names in groups.values() if len(names) > 1 and changed & set(names)]
    return tuple(tied[0]) if tied else ()


def _split(
    tensors: dict[str, SourceTensor],
    names: tuple[str, ...],
    model: nn.Module,
    adapter: Adapter,
) -> None:
    """Give every name of a tensor that was tied a tensor of its own."""
    parameters: Mapping[str, Any] = model.state_dict(keep_vars=True)
    if len({id(parameters[name]) for name in names}) != len(names):
        raise adapter.refuse(
            f"it changes one of {' and '.join(names)}, which this model cannot have apart"
        )
    own = Conversion.of(model).apply(tensors)
    one = next((own[name] for name in names if name in own), None)
    if one is None:
        raise ModelError(f"the checkpoint lacks {names[0]}")
    for name in names:
        if name not in own:
            tensors[name] = one
