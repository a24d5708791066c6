"""Where a model's files say how its checkpoint is quantised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lminf_export.disk import is_file, read_json
from lminf_export.errors import ModelError, shortened

QUANTIZATION = "quantization_config"
# modelopt writes it beside config.json, older versions only there.
MODELOPT_FILE = "hf_quant_config.json"
_ALGORITHM = "quant_algo"


def quantization_of(folder: Path, content: Mapping[str, Any], model: str) -> Any:
    """Return the `quantization_config` of a model, None for a plain checkpoint; it is not checked.

    Args:
        folder: the model's.
        content: of its config.json; that of a wrapper may name it in the table of its text model.
        model: as the user named it, for messages.

    Raises:
        ModelError: modelopt's own file is damaged.
    """
    text = content.get("text_config")
    inner = text.get(QUANTIZATION) if isinstance(text, dict) else None
    settings = content.get(QUANTIZATION, inner)
    is_complete = not isinstance(settings, dict) or _ALGORITHM in settings
    is_other = settings is not None and not _is_modelopt(settings)
    path = folder / MODELOPT_FILE
    if is_other or (settings is not None and is_complete) or not is_file(path):
        return settings
    what = f"{MODELOPT_FILE} of model {shortened(repr(model))}"
    found = read_json(path, ModelError, what)
    found = found.get("quantization", found) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get(_ALGORITHM), str | None):
        raise ModelError(f"{what} is damaged: it names no {_ALGORITHM}")
    if found.get(_ALGORITHM) is None:
        return settings  # nothing but the cache is quantised
    return {**(settings or {}), "quant_method": "modelopt", **found}


def _is_modelopt(settings: Any) -> bool:
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return isinstance(method, str) and method.startswith("modelopt")
