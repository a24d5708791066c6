"""Export decoder language models with Λ-shaped attention, so that a stream never has to end.

`export` turns a Hugging Face model into a bundle, `validate` compares a bundle with a float64
reference, `load` runs one. Every public name is imported when it is first used, so that running a
bundle does not load what exporting needs. Reference: docs/api.md.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# onnxruntime's Linux releases since 1.29 report sessions, with hashes of graphs and weights, to
# their maker unless this variable is set before they are imported. "0" lets them.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from lminf_export.bundle.folder import Bundle as Bundle
    from lminf_export.bundle.hub import push_to_hub as push_to_hub
    from lminf_export.bundle.manifest import Manifest as Manifest
    from lminf_export.capacity.options import CapacityOptions as CapacityOptions
    from lminf_export.capacity.options import ReplicaSpeed as ReplicaSpeed
    from lminf_export.capacity.options import SessionActivity as SessionActivity
    from lminf_export.capacity.plan import plan_capacity as plan_capacity
    from lminf_export.capacity.report import CapacityPlan as CapacityPlan
    from lminf_export.engine.options import EngineOptions as EngineOptions
    from lminf_export.errors import BundleError as BundleError
    from lminf_export.errors import BusyError as BusyError
    from lminf_export.errors import ConfigError as ConfigError
    from lminf_export.errors import DependencyError as DependencyError
    from lminf_export.errors import EngineError as EngineError
    from lminf_export.errors import ExportError as ExportError
    from lminf_export.errors import InputError as InputError
    from lminf_export.errors import LminfError as LminfError
    from lminf_export.errors import ModelError as ModelError
    from lminf_export.errors import ParkedSessionError as ParkedSessionError
    from lminf_export.errors import ParkingError as ParkingError
    from lminf_export.errors import SessionError as SessionError
    from lminf_export.errors import StaleTurnError as StaleTurnError
    from lminf_export.export.options import ExportOptions as ExportOptions
    from lminf_export.export.run import export as export
    from lminf_export.operator.settings import LambdaConfig as LambdaConfig
    from lminf_export.progress import Progress as Progress
    from lminf_export.quantize.config import QuantizeConfig as QuantizeConfig
    from lminf_export.rewriting.run import rewrite as rewrite
    from lminf_export.runtime.batching.batch import Generated as Generated
    from lminf_export.runtime.batching.batch import Piece as Piece
    from lminf_export.runtime.batching.engine import Engine as Engine
    from lminf_export.runtime.batching.request import Kept as Kept
    from lminf_export.runtime.batching.request import Request as Request
    from lminf_export.runtime.batching.request import Token as Token
    from lminf_export.runtime.batching.stats import EngineStats as EngineStats
    from lminf_export.runtime.batching.stream import TokenStream as TokenStream
    from lminf_export.runtime.cache import State as State
    from lminf_export.runtime.chat_template import ChatTemplate as ChatTemplate
    from lminf_export.runtime.conversation import Answer as Answer
    from lminf_export.runtime.conversation import Conversation as Conversation
    from lminf_export.runtime.language_model import LanguageModel as LanguageModel
    from lminf_export.runtime.load import load as load
    from lminf_export.runtime.one_stream import OneStream as OneStream
    from lminf_export.runtime.parking.parked import Parked as Parked
    from lminf_export.runtime.parking.session_store import SessionStore as SessionStore
    from lminf_export.runtime.sampling import SamplingConfig as SamplingConfig
    from lminf_export.runtime.session import Session as Session
    from lminf_export.runtime.snapshot import Snapshot as Snapshot
    from lminf_export.runtime.text import StopText as StopText
    from lminf_export.runtime.text import StreamText as StreamText
    from lminf_export.runtime.text import TextCodec as TextCodec
    from lminf_export.triton.repository import export_triton as export_triton
    from lminf_export.verify.report import ValidationReport as ValidationReport
    from lminf_export.verify.validate import validate as validate

    __version__: str

# Public name → the module it is defined in. A test compares this with the imports above.
_HOMES = {
    "Answer": "runtime.conversation",
    "Bundle": "bundle.folder",
    "BundleError": "errors",
    "BusyError": "errors",
    "CapacityOptions": "capacity.options",
    "CapacityPlan": "capacity.report",
    "ChatTemplate": "runtime.chat_template",
    "ConfigError": "errors",
    "Conversation": "runtime.conversation",
    "DependencyError": "errors",
    "Engine": "runtime.batching.engine",
    "EngineError": "errors",
    "EngineOptions": "engine.options",
    "EngineStats": "runtime.batching.stats",
    "ExportError": "errors",
    "ExportOptions": "export.options",
    "Generated": "runtime.batching.batch",
    "InputError": "errors",
    "Kept": "runtime.batching.request",
    "LambdaConfig": "operator.settings",
    "LanguageModel": "runtime.language_model",
    "LminfError": "errors",
    "Manifest": "bundle.manifest",
    "ModelError": "errors",
    "OneStream": "runtime.one_stream",
    "Parked": "runtime.parking.parked",
    "ParkedSessionError": "errors",
    "ParkingError": "errors",
    "Piece": "runtime.batching.batch",
    "Progress": "progress",
    "QuantizeConfig": "quantize.config",
    "ReplicaSpeed": "capacity.options",
    "Request": "runtime.batching.request",
    "SamplingConfig": "runtime.sampling",
    "Session": "runtime.session",
    "SessionActivity": "capacity.options",
    "SessionError": "errors",
    "SessionStore": "runtime.parking.session_store",
    "Snapshot": "runtime.snapshot",
    "StaleTurnError": "errors",
    "State": "runtime.cache",
    "StopText": "runtime.text",
    "StreamText": "runtime.text",
    "TextCodec": "runtime.text",
    "Token": "runtime.batching.request",
    "TokenStream": "runtime.batching.stream",
    "ValidationReport": "verify.report",
    "export_triton": "triton.repository",
    "load": "runtime.load",
    "plan_capacity": "capacity.plan",
    "push_to_hub": "bundle.hub",
    "rewrite": "rewriting.run",
    "validate": "verify.validate",
}
__all__ = [*_HOMES, "__version__", "export"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from lminf_export.bundle.versions import package_version

        value: Any = package_version("lminf-export", missing="0+unknown")
    elif name == "export":
        # The package of that name, which can be called: see its docstring.
        value = importlib.import_module("lminf_export.export")
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"lminf_export.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
