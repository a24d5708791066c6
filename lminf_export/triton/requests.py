"""Requests of Triton's, read: their tensors, their parameters, their places in sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lminf_export.disk import parse_json
from lminf_export.errors import InputError, shown
from lminf_export.triton.answers import Asked
from lminf_export.triton.interface import INPUTS

# KServe's name of a request, which HTTP's generate hands over beside itself.
_WITHOUT_EFFECT = ("id",)
_OF_SEQUENCES = ("sequence_id", "sequence_start", "sequence_end")
_NOT_APPLIED = ("priority", "timeout")


def asked_of(request: Any, pb: Any) -> Asked:
    """Return what a request asks for.

    Args:
        request: an InferenceRequest of the python backend.
        pb: the module `triton_python_backend_utils`.

    Raises:
        InputError: naming the tensor or the parameter.
    """
    found: dict[str, np.ndarray | None] = {}
    for spec in INPUTS:
        tensor = pb.get_input_tensor_by_name(request, spec.name)
        found[spec.name] = None if tensor is None else tensor.as_numpy().reshape(-1)
    ids, flags = found["input_ids"], request.flags()
    if request.timeout():
        raise InputError(_not_applied("timeout"))
    return Asked(
        sequence=request.correlation_id(),
        starts=bool(flags & pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START),
        ends=bool(flags & pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END),
        text=_text("text_input", found["text_input"]),
        ids=None if ids is None else tuple(ids.tolist()),
        messages=_text("messages", found["messages"]),
        sampling=_text("sampling_parameters", found["sampling_parameters"]) or "{}",
        parameters=_parameters(request.parameters()),
        stream=_flag("stream", found["stream"]),
        with_ids=_flag("return_output_ids", found["return_output_ids"]),
    )


def _parameters(text: str) -> Mapping[str, Any]:
    """Return those of a request's parameters that are to be fields of sampling."""
    try:
        given = parse_json(text or "{}")
    except ValueError as error:
        raise InputError(f"the request's parameters: {error}") from None
    inputs = {spec.name for spec in INPUTS}
    sampling = {}
    for name, value in given.items():
        if name in _WITHOUT_EFFECT or name.startswith("triton_"):
            continue
        if name in _OF_SEQUENCES:
            raise InputError(f"{name}: sequences are gRPC's; HTTP's generate has none")
        if name in _NOT_APPLIED:
            raise InputError(_not_applied(name))
        if name in inputs:
            raise InputError(f"{shown(name)} is an input, not a parameter of the request")
        sampling[name] = value
    return sampling


def _not_applied(name: str) -> str:
    return (
        f"{name} is not applied here: leave it out; an answer ends with its client, or after the "
        "model's max_stream_seconds"
    )


def _text(name: str, array: np.ndarray | None) -> str | None:
    """Return the only text of a tensor; None for one that is not there."""
    if array is None:
        return None
    value = _only(name, "text", array)
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise InputError(f"{name} is no text in UTF-8") from None


def _flag(name: str, array: np.ndarray | None) -> bool:
    return array is not None and bool(_only(name, "value", array))


def _only(name: str, kind: str, array: np.ndarray) -> Any:
    if array.size != 1:
        raise InputError(f"{name} has {array.size} {kind}s; expected one")
    return array[0]
