"""Export decoder language models with Λ-shaped attention, so that a stream never has to end.

`export` turns a Hugging Face model into a bundle, `load` runs one. Names are imported when
first used: running a bundle never pays for what exporting needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lminf_export.bundle.folder import Bundle
    from lminf_export.errors import (
        BundleError,
        ConfigError,
        EngineError,
        ExportError,
        InputError,
        LminfError,
        ModelError,
        SessionError,
    )
    from lminf_export.export.run import export
    from lminf_export.operator.settings import LambdaConfig
    from lminf_export.runtime.language_model import LanguageModel
    from lminf_export.runtime.load import load

    __version__: str

__all__ = [
    "Bundle",
    "BundleError",
    "ConfigError",
    "EngineError",
    "ExportError",
    "InputError",
    "LambdaConfig",
    "LanguageModel",
    "LminfError",
    "ModelError",
    "SessionError",
    "__version__",
    "export",
    "load",
]

_ERRORS = (
    "BundleError",
    "ConfigError",
    "EngineError",
    "ExportError",
    "InputError",
    "LminfError",
    "ModelError",
    "SessionError",
)
_HOMES = {
    **dict.fromkeys(_ERRORS, "lminf_export.errors"),
    "Bundle": "lminf_export.bundle.folder",
    "LambdaConfig": "lminf_export.operator.settings",
    "LanguageModel": "lminf_export.runtime.language_model",
    "load": "lminf_export.runtime.load",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name == "export":
        # The package of this name, which can be called: see its docstring.
        value = importlib.import_module("lminf_export.export")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lminf-export")
    except PackageNotFoundError:
        return "0+unknown"
