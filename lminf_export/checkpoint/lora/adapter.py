"""LoRA adapters of PEFT, merged into a checkpoint while it is written.

The result equals that of PEFT's `merge_and_unload`, W + (alpha / r) · B · A, computed row by row in
float32 without PEFT and without holding a tensor in memory. An adapter that cannot be merged into
plain weights is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lminf_export.checkpoint.conversion import Stacked
from lminf_export.checkpoint.lora.files import CONFIG_NAME, Adapter, Change
from lminf_export.checkpoint.lora.merging import LowRank, Merged, Sum
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.tensors.stored import RawTensor, SourceTensor


def merge(
    adapter: Adapter, checkpoint: Mapping[str, SourceTensor], skeleton: Skeleton, base: str
) -> dict[str, SourceTensor]:
    """Return a checkpoint, in the model's own names, with an adapter added to it.

    Args:
        adapter: the adapter to add.
        checkpoint: the base's tensors, dequantised.
        skeleton: of the base model; gives the names that an adapter may target.
        base: the model's name, for messages.

    Raises:
        ModelError: the adapter is not one of this model, or incomplete.
    """
    model = skeleton.model
    _require_all_targets(adapter, model)
    todo = {**_tensor_names(adapter, model)}
    # Experts of one matrix each have names only before they are stacked.
    raw, replaced = {**checkpoint}, {**adapter.replaced}
    for name in [name for name in replaced if name in raw]:
        raw[name] = _replaced(adapter, name, raw, replaced.pop(name), base)
    for name in [name for name in todo if name in raw]:
        raw[name] = _changed(adapter, name, raw[name], todo.pop(name), model)
    merged = skeleton.conversion.apply(raw)
    for name, tensor in replaced.items():
        merged[name] = _replaced(adapter, name, merged, tensor, base)
    for name, change in todo.items():
        if name not in merged:
            owner = adapter.settings.get("base_model_name_or_path")
            trained = f" (it was trained on {Path(owner).name!r})" if owner else ""
            raise adapter.refuse(f"it changes {name}, which model {base!r} does not have{trained}")
        merged[name] = _changed(adapter, name, merged[name], change, model)
    return merged


def _replaced(
    adapter: Adapter,
    name: str,
    tensors: Mapping[str, SourceTensor],
    tensor: RawTensor,
    base: str,
) -> RawTensor:
    """Return the tensor that an adapter puts in the place of another of the same shape."""
    shape = tensors[name].shape if name in tensors else None
    if shape != tensor.shape:
        here = f"has as {list(shape)}" if shape is not None else "does not have"
        raise adapter.refuse(
            f"it holds {name} of shape {list(tensor.shape)}, which model {base!r} {here}"
        )
    return tensor


def changed_tensors(adapter: Adapter, model: nn.Module) -> set[str]:
    """Return the names of the tensors an adapter changes."""
    return {*_tensor_names(adapter, model), *adapter.replaced}


def _tensor_names(adapter: Adapter, model: nn.Module) -> dict[str, Change]:
    """Return name of a tensor → how it changes."""
    found: dict[str, Change] = {}
    deepest: dict[str, int] = {}
    for module, depth in adapter.changes:
        deepest[module] = max(depth, deepest.get(module, 0))
    for (module, depth), change in adapter.changes.items():
        parameters = _target_parameters(adapter, model, module)
        if parameters:
            # PEFT wraps the parameters in their order, so the outermost is the last.
            if deepest[module] + 1 != len(parameters):
                raise adapter.refuse(
                    f"{module} has {len(parameters)} target parameters and "
                    f"{deepest[module] + 1} changes"
                )
            found[f"{module}.{parameters[-1 - depth]}"] = change
            continue
        found[f"{module}.weight"] = change
        if "bias" in change.parts:
            found[f"{module}.bias"] = change
    return found


def _target_parameters(adapter: Adapter, model: nn.Module, module: str) -> list[str]:
    targets = adapter.settings.get("target_parameters") or ()
    if not targets:
        return []
    try:
        owner = model.get_submodule(module)
    except AttributeError:
        return []
    outer = adapter.outer_name(module)
    names = [name for name, _ in owner.named_parameters(recurse=False)]
    return [name for name in names if any(_ends_with(f"{outer}.{name}", x) for x in targets)]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _changed(
    adapter: Adapter, name: str, base: SourceTensor, change: Change, model: nn.Module
) -> SourceTensor:
    """Describe a tensor with its change added."""
    module = name.removesuffix(".weight").removesuffix(".bias")
    if name.endswith(".bias"):
        _, scale = adapter.scale(module)
        return Sum(base, change.parts["bias"], scale)
    is_embedding = "embedding_A" in change.parts or "embedding_B" in change.parts
    prefix = "embedding_" if is_embedding else ""
    for side in ("A", "B"):
        if prefix + side not in change.parts:
            raise adapter.refuse(f"it lacks lora_{prefix}{side} of {module}; it is incomplete")
    down, up = change.parts[f"{prefix}A"], change.parts[f"{prefix}B"]
    magnitude = change.parts.get("magnitude_vector")
    if magnitude is not None and (is_embedding or len(base.shape) != 2):
        raise adapter.refuse(f"{module} is an embedding with a DoRA magnitude, which is not merged")
    if adapter.settings.get("use_dora") and magnitude is None and not is_embedding:
        raise adapter.refuse(f"it lacks lora_magnitude_vector of {module}; it is incomplete")
    rank, scale = adapter.scale(module)
    experts = base.shape[0] if len(base.shape) == 3 else 1
    matrix = base.shape[-2:]
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != rank * experts:
        raise adapter.refuse(
            f"lora_{prefix}A of {module} has shape {list(down.shape)}, {CONFIG_NAME} asks for "
            f"rank {rank}"
        )
    turned = is_embedding or _is_turned(adapter, model, module, matrix, down, up)
    change_ = LowRank(down, up, scale, turned, 0, experts)
    if change_.shape != matrix or up.shape[1] != down.shape[0]:
        raise adapter.refuse(
            f"{module} has shape {list(base.shape)}, the adapter's change {list(change_.shape)}; "
            f"it was trained on another model"
        )
    if experts == 1:
        return Merged(base, change_, magnitude)
    return Stacked(
        tuple(
            Merged(base.at(index), LowRank(down, up, scale, turned, index, experts))
            for index in range(experts)
        )
    )


def _is_turned(
    adapter: Adapter,
    model: nn.Module,
    name: str,
    matrix: tuple[int, ...],
    down: RawTensor,
    up: RawTensor,
) -> bool:
    """Whether a matrix is stored as (in, out): in some stacks of experts, and in old layers."""
    plain, turned = (up.shape[0], down.shape[1]), (down.shape[1], up.shape[0])
    if plain != turned:
        return matrix == turned
    try:
        owner = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return False
    return bool(getattr(owner, "is_transposed", False))


def _require_all_targets(adapter: Adapter, model: nn.Module) -> None:
    """Check that every layer the configuration targets has its change in the file."""
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)) or not _is_targeted(adapter, name):
            continue
        if (name, 0) not in adapter.changes:
            raise adapter.refuse(
                f"{CONFIG_NAME} targets {name}, and its file has no tensors for it; it is "
                f"incomplete or of another model"
            )


def _is_targeted(adapter: Adapter, name: str) -> bool:
    """Say whether PEFT would change a module; by the same rules."""
    settings, name = adapter.settings, adapter.outer_name(name)
    targets = settings.get("target_modules")
    if not targets or targets == "all-linear" or _matches(settings.get("exclude_modules"), name):
        return False
    if any(re.match(rf"(^|.*\.){x}($|\..*)", name) for x in settings.get("modules_to_save") or ()):
        return False
    if not _matches(targets, name):
        return False
    wanted = settings.get("layers_to_transform")
    if isinstance(targets, str) or wanted is None or wanted == []:
        return True
    patterns = settings.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    number = next(_layer_numbers(patterns, name), None)
    return number is not None and number in ([wanted] if isinstance(wanted, int) else wanted)


def _layer_numbers(patterns: list[str], name: str) -> Iterator[int]:
    for pattern in patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if match:
            yield int(match[1])


def _matches(targets: Any, name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(_ends_with(name, target) for target in targets or ())
