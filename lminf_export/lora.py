"""LoRA adapters of PEFT, merged into a checkpoint while it is written.

What `merge_and_unload` of PEFT would give, without PEFT and without holding a tensor in memory:
W + (alpha / r) · B · A, row by row in float32. The adapter's tensors say which layers change;
`adapter_config.json` says by how much, and what else the adapter does. What cannot be merged into
plain weights is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lminf_export.conversion import Conversion, Stacked
from lminf_export.errors import ModelError
from lminf_export.merging import LowRank, Merged, Sum
from lminf_export.weights import RawTensor, SourceTensor, read_checkpoint_file

CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
# Starting points that also change the weights the adapter is added to, and those that do not.
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")
# Settings under which the trained model is no longer base + low rank; `use_…` are checked by name.
_UNMERGEABLE = (
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
_UNDERSTOOD_USES = ("use_rslora", "use_dora")
_LORA_KEY = re.compile(
    r"(?P<module>.+?)(?P<inner>(\.base_layer)*)\.lora_(?P<kind>A|B|embedding_A|embedding_B"
    r"|magnitude_vector)(\.default)?(?P<last>\.weight|\.bias)?"
)
_SAVED_KEY = re.compile(r"(?P<name>.+?)(\.modules_to_save\.default|\.base_layer)?(?P<last>\.\w+)")


@dataclass
class Change:
    """What an adapter does to one module.

    Attributes:
        parts: "A", "B", "embedding_A", "embedding_B", "magnitude_vector" or "bias" → tensor.
    """

    parts: dict[str, RawTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        name: its folder's.
        settings: its configuration.
        changes: (module, how deep it is wrapped) → change; depth is 0 but for parameters.
        replaced: name of a tensor → what is in its place.
    """

    name: str
    settings: Mapping[str, Any]
    changes: dict[tuple[str, int], Change]
    replaced: dict[str, RawTensor]

    def scale(self, name: str) -> tuple[int, float]:
        """Return rank and factor of a module or parameter, after the adapter's patterns."""
        rank = self._of_pattern("rank_pattern", name, self.settings.get("r", 8))
        alpha = self._of_pattern("alpha_pattern", name, self.settings.get("lora_alpha", 8))
        return rank, alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def _of_pattern(self, setting: str, name: str, default: Any) -> Any:
        for pattern, value in (self.settings.get(setting) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        return default

    def refuse(self, reason: str) -> ModelError:
        """Return an error of this adapter."""
        return ModelError(f"adapter {self.name!r}: {reason}")


def read_adapter(path: str | Path, *, allow_pickle: bool = False) -> Adapter:
    """Read an adapter's configuration and the list of its tensors.

    Args:
        path: its folder, or one of its two files.
        allow_pickle: read `adapter_model.bin` where there are no safetensors.

    Raises:
        ModelError: it is missing, damaged, or of a kind that cannot be merged.
    """
    folder = Path(path).expanduser()
    if folder.is_file() and folder.name in (CONFIG_NAME, *WEIGHT_NAMES):
        folder = folder.parent
    settings = _read_settings(folder, str(path))
    name = folder.resolve().name
    reason = _why_not(settings)
    if reason:
        raise ModelError(f"adapter {name!r}: {reason}")
    changes: dict[tuple[str, int], Change] = {}
    replaced: dict[str, RawTensor] = {}
    for key, tensor in _read_tensors(folder, allow_pickle).items():
        plain = key.removeprefix(_PREFIX)
        match = _LORA_KEY.fullmatch(plain)
        if match:
            part = "bias" if match["last"] == ".bias" else match["kind"]
            place = match["module"], match["inner"].count("base_layer")
            changes.setdefault(place, Change()).parts[part] = tensor
            continue
        saved = _SAVED_KEY.fullmatch(plain)
        if saved is None or "lora_" in plain or ".token_adapter." in plain:
            raise ModelError(f"adapter {name!r}: its tensor {key} is not understood")
        if ".original_module." not in plain:
            replaced[saved["name"] + saved["last"]] = tensor
    if not changes and not replaced:
        raise ModelError(f"adapter {name!r}: its file holds no tensors")
    return Adapter(name, settings, changes, replaced)


def _read_settings(folder: Path, asked: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(
            f"adapter {asked!r}: no such folder; give the one that holds {CONFIG_NAME}, fetched "
            f"from the hub where it is there"
        )
    path = folder / CONFIG_NAME
    if not path.is_file():
        several = sorted(x.parent.name for x in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f"; it holds several ({', '.join(several)}): give one of them" if several else ""
        raise ModelError(f"adapter {asked!r} has no {CONFIG_NAME}{hint}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{CONFIG_NAME} of adapter {asked!r} is not valid JSON: {error}"
        ) from error
    if not isinstance(settings, dict):
        raise ModelError(f"{CONFIG_NAME} of adapter {asked!r} holds no settings")
    return settings


def _read_tensors(folder: Path, allow_pickle: bool) -> dict[str, RawTensor]:
    path = next((folder / x for x in WEIGHT_NAMES if (folder / x).is_file()), None)
    if path is None:
        raise ModelError(f"adapter {folder.name!r} has no {WEIGHT_NAMES[0]}")
    if path.suffix == ".bin" and not allow_pickle:
        raise ModelError(
            f"adapter {folder.name!r} is {path.name}, a pickle, which is not loaded unasked: "
            f"convert it to safetensors, or give --allow-pickle"
        )
    return read_checkpoint_file(path)


def _why_not(settings: Mapping[str, Any]) -> str | None:
    """Return why an adapter of these settings cannot be merged, or None."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        return f"peft_type is {kind}; only LORA can be merged"
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _HARMLESS_STARTS:
        return (
            f"init_lora_weights={start!r} changed the base model too; save the adapter with "
            f"path_initial_model_for_weight_conversion, which makes it a plain one"
        )
    uses = [x for x in settings if x.startswith("use_") and x not in _UNDERSTOOD_USES]
    for name in (*_UNMERGEABLE, *uses):
        if settings.get(name):
            return f"{name} is set; such an adapter cannot be merged into plain weights"
    for name, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = settings.get(name, 8)
        if not isinstance(value, kinds) or isinstance(value, bool) or (name == "r" and value < 1):
            return f"{name}={value!r} in {CONFIG_NAME}: must be a number above 0"
    for name in ("rank_pattern", "alpha_pattern"):
        table = settings.get(name) or {}
        if not isinstance(table, dict) or any(
            not isinstance(x, (int, float)) or x <= 0 for x in table.values()
        ):
            return f"{name} in {CONFIG_NAME} must map names to numbers above 0"
    return _bad_names(settings)


def _bad_names(settings: Mapping[str, Any]) -> str | None:
    """Return which names or patterns of a configuration mean nothing, or None."""
    patterns = [*(settings.get("rank_pattern") or ()), *(settings.get("alpha_pattern") or ())]
    for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        value = settings.get(name) or []
        patterns += [value] if isinstance(value, str) else []
        is_list = isinstance(value, list) and all(isinstance(x, str) for x in value)
        if not is_list and not (isinstance(value, str) and name.endswith("_modules")):
            return f"{name}={value!r} in {CONFIG_NAME}: must be a list of names"
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            return f"pattern {pattern!r} in {CONFIG_NAME} is none: {error}"
    return None


def merge(
    adapter: Adapter, checkpoint: Mapping[str, SourceTensor], model: nn.Module, base: str
) -> dict[str, SourceTensor]:
    """Return a checkpoint, in the model's own names, with an adapter added to it.

    Args:
        adapter: what is added.
        checkpoint: the base's tensors, dequantised.
        model: of transformers, on the meta device; tells names and what adapters may target.
        base: the model's name, for messages.

    Raises:
        ModelError: the adapter is not one of this model, or incomplete.
    """
    _require_all_targets(adapter, model)
    todo = {**_tensor_names(adapter, model)}
    # Experts of one matrix each have names only before they are stacked.
    raw, replaced = {**checkpoint}, {**adapter.replaced}
    for name in [name for name in replaced if name in raw]:
        raw[name] = _replaced(adapter, name, raw, replaced.pop(name), base)
    for name in [name for name in todo if name in raw]:
        raw[name] = _changed(adapter, name, raw[name], todo.pop(name), model)
    merged = Conversion.of(model).apply(raw)
    for name, tensor in replaced.items():
        merged[name] = _replaced(adapter, name, merged, tensor, base)
    for name, change in todo.items():
        if name not in merged:
            owner = adapter.settings.get("base_model_name_or_path")
            trained = f" (it was trained on {Path(owner).name!r})" if owner else ""
            raise adapter.refuse(f"it changes {name}, which model {base!r} has not{trained}")
        merged[name] = _changed(adapter, name, merged[name], change, model)
    return merged


def _replaced(
    adapter: Adapter,
    name: str,
    tensors: Mapping[str, SourceTensor],
    tensor: RawTensor,
    base: str,
) -> RawTensor:
    """Return what an adapter has in the place of a tensor, if it fits there."""
    shape = tensors[name].shape if name in tensors else None
    if shape != tensor.shape:
        here = f"has as {list(shape)}" if shape is not None else "has not"
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
    names = [name for name, _ in owner.named_parameters(recurse=False)]
    return [name for name in names if any(_ends_with(f"{module}.{name}", x) for x in targets)]


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
    settings = adapter.settings
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
