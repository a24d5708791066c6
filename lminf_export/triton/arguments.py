"""The arguments of `export_triton`, checked before anything is read or written."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lminf_export.bundle.folder import Bundle
from lminf_export.errors import InputError, shown
from lminf_export.operator.settings import require_one_of
from lminf_export.triton.interface import BACKENDS, Backend
from lminf_export.triton.parameters import Parameters
from lminf_export.triton.plans import require_runnable, why_not_tensorrt_backend

logger = logging.getLogger(__name__)

# Of the bundle in a model's version.
BUNDLE = "bundle"
# What is not of the python backend only.
_OF_THE_GRAPH = ("kernels",)
_OF_THE_PLAN = ("trust_hash",)
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def checked_backends(backends: object) -> list[Backend]:
    """Return the backends, each once.

    Raises:
        InputError: there are none, or others.
    """
    if isinstance(backends, str) or not isinstance(backends, Sequence) or not backends:
        raise InputError(f"backends={shown(backends)}: expected some of {', '.join(BACKENDS)}")
    for backend in backends:
        require_one_of("backends", backend, BACKENDS, InputError)
    return list(dict.fromkeys(backends))


def checked_name(name: object) -> str:
    """Return the model's name, which is a folder's and a part of addresses.

    Raises:
        InputError: it is none.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"name={shown(name)}: a model's name has letters and digits of ASCII, -, _ and, not "
            "at its beginning, dots; see --name"
        )
    return name


def checked_parameters(
    parameters: object, backends: Sequence[Backend], slots: int
) -> dict[str, str]:
    """Return the parameters of the model, with its slots and the place of its bundle.

    Raises:
        LminfError: naming the parameter, and its rule.
    """
    if not isinstance(parameters, Mapping | None):
        raise InputError(f"parameters={shown(parameters)}: must be names and texts (a dict)")
    given = dict(parameters or {})
    if "slots" in given:
        raise InputError("parameters: slots is an argument of its own; leave it out here")
    result = {BUNDLE: BUNDLE, "slots": str(slots), **given}
    Parameters.of(result)
    if list(backends) == ["onnxruntime"]:
        _require_used(given, _OF_THE_GRAPH, backends)
    return result


def _require_used(given: Mapping[str, str], used: Sequence[str], backends: Sequence[str]) -> None:
    """Refuse parameters that none of the models has.

    Raises:
        InputError: naming them.
    """
    if unused := sorted(given.keys() - set(used)):
        raise InputError(
            f"parameters: {', '.join(unused)}: of the python backend, which runs no model of "
            f"{', '.join(backends)}"
        )


def require_in_bundle(
    bundle: Bundle, backends: Sequence[Backend], slots: int, parameters: Mapping[str, str]
) -> None:
    """Check that a bundle has what the backends are to run.

    Args:
        bundle: opened.
        backends: that are asked for.
        slots: sequences side by side.
        parameters: from `checked_parameters`.

    Raises:
        LminfError: it has not, or nobody trusts it.
    """
    engine = bundle.manifest.engine
    places = [BUNDLE] if engine is None else [BUNDLE, f"{BUNDLE}/{engine.file}"]
    if parameters[BUNDLE] not in places:
        raise InputError(
            f"bundle={shown(parameters[BUNDLE])}: expected {' or '.join(places)}, which the "
            "repository has"
        )
    trust_hash = parameters.get("trust_hash")
    if engine is None and trust_hash is not None:
        raise InputError(f"trust_hash: {bundle.path} has no plan, and a graph needs no trust")
    if "tensorrt" in backends:
        if engine is None:
            raise InputError(f"{bundle.path} has no plan; leave tensorrt out")
        if "python" not in backends and why_not_tensorrt_backend(bundle.manifest) is None:
            given = {name: parameters[name] for name in parameters if name not in (BUNDLE, "slots")}
            _require_used(given, (*_OF_THE_GRAPH, *_OF_THE_PLAN), backends)
        folder = parameters.get("session_folder", "")
        if "python" in backends and Path(folder).is_absolute():
            raise InputError(
                f"session_folder={shown(folder)}: two models cannot have one folder of sessions; "
                "give a path that is not absolute, which is in each model's own folder, or a "
                "session_store"
            )
    if "tensorrt" in backends or parameters[BUNDLE] != BUNDLE:
        require_runnable(bundle, slots, trust_hash)
    is_ours = "python" in backends or (
        "tensorrt" in backends and why_not_tensorrt_backend(bundle.manifest) is not None
    )
    if is_ours and bundle.tokenizer_path is None:
        logger.warning(
            "%s has no tokenizer.json: the model of the python backend will not load; "
            "onnxruntime's needs none",
            bundle.path,
        )
    if "onnxruntime" in backends and bundle.manifest.contract.dtype == "bfloat16":
        raise InputError("onnxruntime's backend takes no bfloat16; export with another --dtype")
