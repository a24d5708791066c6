"""A model's tensors as they are exported: read, decoded where quantised, an adapter merged."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lminf_export.checkpoint.dequantize import methods
from lminf_export.checkpoint.gguf.names import model_tensors
from lminf_export.checkpoint.lora.adapter import merge
from lminf_export.checkpoint.lora.files import read_adapter
from lminf_export.checkpoint.lora.text_part import of_text_part
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.checkpoint.source import Source
from lminf_export.checkpoint.tying import changed_apart, check_apart, split, stored_apart, untied
from lminf_export.models.base import ATTENTION_NAME, attention_name, register_attention
from lminf_export.models.remote_code import new_model, runs_own_code
from lminf_export.models.wrappers import text_only_notice
from lminf_export.tensors.files import find_weights, read_checkpoint
from lminf_export.tensors.rows import fill
from lminf_export.tensors.stored import SourceTensor

TIED_APART = "config.json ties tensors of which the checkpoint holds different ones"


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors as they are written into a bundle.

    Attributes:
        source: the model; its configuration is that of the tensors: where the checkpoint holds
            two different tensors for tied ones, or an adapter changes one of them, it ties nothing.
        tensors: by name.
        skeleton: the model of that configuration, without numbers.
        adapter: name of the adapter that is merged, or None.
        notices: lines for the user.
        is_computed: the tensors are made of those in the files, such as a quantised bundle's.
    """

    source: Source
    tensors: dict[str, SourceTensor]
    skeleton: Skeleton
    adapter: str | None
    notices: tuple[str, ...]
    is_computed: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether transformers makes the same model of the folder as it is."""
        source = self.source
        is_made = self.adapter is not None or self.is_computed or source.gguf is not None
        is_whole = source.quantization is None and source.text_part is None
        return not is_made and is_whole and not source.is_untied


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
        skeleton: of the source's configuration; by default a new one. Tensors that are tied no
            longer change the configuration, which takes a second one.
        allow_pickle: read `.bin` files where there are no safetensors.

    Raises:
        ModelError: a file is missing or damaged, of a kind that is not read, or the adapter is
            not one of this model.
    """
    found = read_adapter(adapter, allow_pickle=allow_pickle) if adapter is not None else None
    skeleton = skeleton or Skeleton(source.config)
    tensors, notices = _read_tensors(source, skeleton, allow_pickle=allow_pickle)
    if source.text_part is not None:
        notices = (text_only_notice(source.text_part.model_type), *notices)
        if found is not None:
            found, notice = of_text_part(found, source.text_part)
            notices = (*notices, *([notice] if notice else []))
    apart = stored_apart(tensors, skeleton)
    if apart:
        source, skeleton = untied(source, skeleton)
        check_apart(apart, skeleton, "the checkpoint")
        notices = (*notices, f"{TIED_APART}: {' and '.join(apart)} are both kept")
    if found is None:
        return Checkpoint(source, tensors, skeleton, None, notices)
    apart = changed_apart(found, skeleton)
    if apart:
        source, skeleton = untied(source, skeleton)
        check_apart(apart, skeleton, f"adapter {found.name!r}")
        split(tensors, apart, skeleton)
        notices = (*notices, f"adapter {found.name!r} unties {' and '.join(apart)}")
    tensors = merge(found, tensors, skeleton, source.name)
    return Checkpoint(source, tensors, skeleton, found.name, notices)


def _read_tensors(
    source: Source, skeleton: Skeleton, *, allow_pickle: bool
) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """Describe the tensors of a source, decoded; return them with lines for the user."""
    if source.gguf is not None:
        return model_tensors(source.gguf.gguf, skeleton), source.gguf.notices
    raw = read_checkpoint(source.folder, allow_pickle=allow_pickle)
    tensors = methods.dequantize_checkpoint(raw, source.quantization)
    if source.text_part is not None:
        tensors = source.text_part.tensors(tensors)
    return tensors, methods.notices(raw, source.quantization) if source.quantization else ()


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

    source, settings = checkpoint.source, model_settings(checkpoint, dtype, attention)
    # transformers' loading leaves empty what code of a repository computes when it is built.
    is_plain = checkpoint.is_plain and not runs_own_code(source.config)
    if is_plain and any(source.folder.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=copy.deepcopy(source.config),
            use_safetensors=True,
            trust_remote_code=False,
            **settings,
        ).eval()
    model = new_model(source.config, **settings)
    _fill(model, checkpoint)
    return model.eval()


def model_settings(
    checkpoint: Checkpoint, dtype: torch.dtype, attention: str | None
) -> dict[str, Any]:
    """Return how transformers builds a model; arguments as for `load_model`."""
    register_attention()
    if attention == ATTENTION_NAME:
        attention = attention_name(checkpoint.source.config)
    return {
        "dtype": dtype,
        "attn_implementation": attention,
        "experts_implementation": "eager",  # the only one that takes float64, and the plainest
    }


@torch.no_grad()
def _fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's tensors into a model's, block by block."""
    skeleton, state = checkpoint.skeleton, model.state_dict()
    own = skeleton.conversion.apply(checkpoint.tensors)
    wanted = {group[0]: group for group in skeleton.groups}
    if runs_own_code(checkpoint.source.config):
        # Parts that are for training alone are not exported.
        wanted = {name: group for name, group in wanted.items() if any(x in own for x in group)}
    for name, tensor in find_weights(own, wanted, skeleton.shapes).items():
        fill(state[name], tensor)
