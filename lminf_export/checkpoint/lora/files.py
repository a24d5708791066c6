"""LoRA adapters of PEFT as they are on disk: settings, tensors, and refusals.

The adapter's tensors say which layers change; `adapter_config.json` says by how much, and what
else the adapter does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lminf_export.checkpoint.links import refuse_links_to_outside
from lminf_export.disk import is_dir, is_file, read_json, user_path
from lminf_export.errors import ModelError, shortened
from lminf_export.tensors.files import read_checkpoint_file
from lminf_export.tensors.stored import RawTensor

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
    """The change of one module by an adapter.

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
        replaced: name of a tensor → the tensor in its place.
        outer_name: from a name in `changes` and `replaced` to the one that the settings mean, which
            differs where the adapter was trained on a model around this one.
    """

    name: str
    settings: Mapping[str, Any]
    changes: dict[tuple[str, int], Change]
    replaced: dict[str, RawTensor]
    outer_name: Callable[[str], str] = str

    def scale(self, name: str) -> tuple[int, float]:
        """Return rank and factor of a module or parameter, after the adapter's patterns."""
        rank = self._of_pattern("rank_pattern", name, self.settings.get("r", 8))
        alpha = self._of_pattern("alpha_pattern", name, self.settings.get("lora_alpha", 8))
        return rank, alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def _of_pattern(self, setting: str, name: str, default: Any) -> Any:
        for pattern, value in (self.settings.get(setting) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", self.outer_name(name)):
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
    folder = user_path(path, ModelError)
    if is_file(folder) and folder.name in (CONFIG_NAME, *WEIGHT_NAMES):
        folder = folder.parent
    if is_dir(folder):
        refuse_links_to_outside(folder)
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
            raise ModelError(f"adapter {name!r}: its tensor {key} is of no known kind")
        if ".original_module." not in plain:
            replaced[saved["name"] + saved["last"]] = tensor
    if not changes and not replaced:
        raise ModelError(f"adapter {name!r}: its file holds no tensors")
    return Adapter(name, settings, changes, replaced)


def _read_settings(folder: Path, asked: str) -> dict[str, Any]:
    named = shortened(repr(asked))
    if not is_dir(folder):
        raise ModelError(
            f"adapter {named}: no such folder; give the one that holds {CONFIG_NAME}, fetched "
            f"from the hub where it is there"
        )
    path = folder / CONFIG_NAME
    if not is_file(path):
        several = sorted(x.parent.name for x in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f"; it holds several ({', '.join(several)}): give one of them" if several else ""
        raise ModelError(f"adapter {named} has no {CONFIG_NAME}{hint}")
    settings = read_json(path, ModelError, f"{CONFIG_NAME} of adapter {named}")
    if not isinstance(settings, dict):
        raise ModelError(f"{CONFIG_NAME} of adapter {named} holds no settings")
    return settings


def _read_tensors(folder: Path, allow_pickle: bool) -> dict[str, RawTensor]:
    path = next((folder / x for x in WEIGHT_NAMES if (folder / x).is_file()), None)
    if path is None:
        raise ModelError(f"adapter {folder.name!r} has no {WEIGHT_NAMES[0]}")
    if path.suffix == ".bin" and not allow_pickle:
        raise ModelError(
            f"adapter {folder.name!r} is {path.name}, a pickle, which is loaded with "
            f"--allow-pickle only: give that, or convert it to safetensors"
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
