"""Tied tensors that are to be kept apart: by the checkpoint's own files, or by an adapter.

Tied are tensors that the model's configuration makes one, such as the embedding of tokens and the
head. transformers ties them by value: where a checkpoint holds both and they differ, it keeps both,
and so does this package.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from lminf_export.checkpoint.lora.adapter import changed_tensors
from lminf_export.checkpoint.lora.files import Adapter
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.checkpoint.source import Source
from lminf_export.errors import ModelError
from lminf_export.tensors.pieces import stored_parts
from lminf_export.tensors.stored import SourceTensor


def stored_apart(tensors: Mapping[str, SourceTensor], skeleton: Skeleton) -> tuple[str, ...]:
    """Return the names of a tied tensor of which a checkpoint holds different ones; () if none.

    Args:
        tensors: the checkpoint's, by its own names.
        skeleton: of its configuration.
    """
    ties = getattr(skeleton.config, "tie_word_embeddings", True)
    if not ties or not skeleton.tied:
        return ()
    own = skeleton.conversion.apply(tensors)
    for group in skeleton.tied:
        held = tuple(name for name in group if name in own)
        if any(not _are_equal(own[held[0]], own[name]) for name in held[1:]):
            return held
    return ()


def changed_apart(adapter: Adapter, skeleton: Skeleton) -> tuple[str, ...]:
    """Return the names of a tied tensor that an adapter changes under one of them only."""
    if adapter.settings.get("ensure_weight_tying"):
        return ()
    changed = changed_tensors(adapter, skeleton.model)
    return next((names for names in skeleton.tied if changed & set(names)), ())


def untied(source: Source, skeleton: Skeleton) -> tuple[Source, Skeleton]:
    """Return a source and its skeleton with a configuration that ties nothing."""
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = False
    return replace(source, config=config, is_untied=True), skeleton.of(config)


def check_apart(names: tuple[str, ...], skeleton: Skeleton, who: str) -> None:
    """Check that a skeleton that should tie nothing has these tensors apart.

    Raises:
        ModelError: the model has one tensor for them whatever its configuration says.
    """
    if any(len(set(names) & set(group)) > 1 for group in skeleton.tied):
        raise ModelError(
            f"{who} has different tensors {' and '.join(names)}, which this model cannot have apart"
        )


def split(tensors: dict[str, SourceTensor], names: tuple[str, ...], skeleton: Skeleton) -> None:
    """Give every name of a tensor that was tied a tensor of its own.

    Raises:
        ModelError: the checkpoint has it under none of its names.
    """
    own = skeleton.conversion.apply(tensors)
    one = next((own[name] for name in names if name in own), None)
    if one is None:
        raise ModelError(f"the checkpoint lacks {names[0]}")
    for name in names:
        if name not in own:
            tensors[name] = one


def _are_equal(left: SourceTensor, right: SourceTensor) -> bool:
    """Return whether two tensors have equal numbers, whatever their element types."""
    if left.shape != right.shape:
        return False
    if (parts := stored_parts(left)) and parts == stored_parts(right):
        return True
    return all(torch.equal(a.float(), b.float()) for a, b in _side_by_side(left, right))


def _side_by_side(
    left: SourceTensor, right: SourceTensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the elements of two tensors of one size, in order, in flat blocks of equal lengths."""
    blocks = left.blocks(), right.blocks()
    pair = [torch.empty(0), torch.empty(0)]
    while True:
        for side, iterator in enumerate(blocks):
            if not len(pair[side]):
                pair[side] = next(iterator, pair[side])
        count = min(len(block) for block in pair)
        if not count:
            return
        yield pair[0][:count], pair[1][:count]
        pair = [block[count:] for block in pair]
