"""A model's tensors as they are exported: read, decoded where quantised, an adapter merged."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lminf_export.checkpoint.dequantize import methods
from lminf_export.checkpoint.lora.adapter import changed_tensors, merge
from lminf_export.checkpoint.lora.files import Adapter, read_adapter
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.checkpoint.source import Source
from lminf_export.errors import ModelError
from lminf_export.models.base import register_attention
from lminf_export.tensors.files import find_weights, read_checkpoint
from lminf_export.tensors.stored import SourceTensor


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors as they are written into a bundle.

    Attributes:
        source: the model; its configuration is that of the tensors, so with an adapter that
            changes one of two tied tensors it ties them no longer.
        tensors: by name.
        skeleton: the model of that configuration, without numbers.
        adapter: name of the adapter that is merged, or None.
        notices: lines for the user.
    """

    source: Source
    tensors: dict[str, SourceTensor]
    skeleton: Skeleton
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
    skeleton: Skeleton | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Read the list of a model's tensors.

    Args:
        source: the model.
        adapter: folder of a PEFT LoRA adapter to merge.
        skeleton: of the source's configuration; by default a new one. An adapter that unties
            embeddings changes the configuration, which takes a second one.
        allow_pickle: read `.bin` files where there are no safetensors.

    Raises:
        ModelError: a file is missing or damaged, of a kind that is not read, or the adapter is
            not one of this model.
    """
    found = read_adapter(adapter, allow_pickle=allow_pickle) if adapter is not None else None
    raw = read_checkpoint(source.folder, allow_pickle=allow_pickle)
    tensors = methods.dequantize_checkpoint(raw, source.quantization)
    notices = (methods.notice(source.quantization),) if source.quantization else ()
    skeleton = skeleton or Skeleton(source.config)
    if found is None:
        return Checkpoint(source, tensors, skeleton, None, notices)
    untied = _untied_names(found, skeleton)
    if untied:
        config = copy.deepcopy(source.config)
        config.tie_word_embeddings = False
        source = replace(source, config=config, is_untied=True)
        skeleton = skeleton.of(config)
        _split(tensors, untied, skeleton, found)
        notices = (*notices, f"adapter {found.name!r} unties {' and '.join(untied)}")
    tensors = merge(found, tensors, skeleton, source.name)
    return Checkpoint(source, tensors, skeleton, found.name, notices)


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
    _fill(model, checkpoint)
    return model.eval()


@torch.no_grad()
def _fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's tensors into a model's, block by block."""
    skeleton, state = checkpoint.skeleton, model.state_dict()
    own = skeleton.conversion.apply(checkpoint.tensors)
    wanted = {group[0]: group for group in skeleton.groups}
    for name, tensor in find_weights(own, wanted, skeleton.shapes).items():
        place, start = state[name].view(-1), 0
        for block in tensor.blocks():
            place[start : start + block.numel()] = block
            start += block.numel()


def _untied_names(adapter: Adapter, skeleton: Skeleton) -> tuple[str, ...]:
    """Return the names of a tied tensor that the adapter changes under one of them only."""
    if adapter.settings.get("ensure_weight_tying"):
        return ()
    changed = changed_tensors(adapter, skeleton.model)
    return next((names for names in skeleton.tied if changed & set(names)), ())


def _split(
    tensors: dict[str, SourceTensor],
    names: tuple[str, ...],
    skeleton: Skeleton,
    adapter: Adapter,
) -> None:
    """Give every name of a tensor that was tied a tensor of its own."""
    if any(len(set(names) & set(group)) > 1 for group in skeleton.tied):
        raise adapter.refuse(
            f"it changes one of {' and '.join(names)}, which this model cannot have apart"
        )
    own = skeleton.conversion.apply(tensors)
    one = next((own[name] for name in names if name in own), None)
    if one is None:
        raise ModelError(f"the checkpoint lacks {names[0]}")
    for name in names:
        if name not in own:
            tensors[name] = one
