"""Requests in the forms of other models' clients, to a real tritonserver; see `triton_run`.

Sampling as parameters of a request, by gRPC and by HTTP's `generate` and `generate_stream`; names
that nothing is known of; a tensor of a wrong shape, behind which the model must be unloaded.
"""

from __future__ import annotations

import json
import queue
import time
from typing import Any

import httpx
import numpy as np
import tritonclient.grpc as grpc

from benchmarks.scaling.triton_client import Client
from benchmarks.scaling.triton_server import TritonServer

_WRONG: dict[str, dict[str, Any]] = {
    "unknown_name": {"top_q": 1},
    "sequence": {"sequence_id": 31, "sequence_start": True},
    "priority": {"priority": 3},
    "twice": {"max_tokens": 4, "sampling_parameters": '{"max_tokens": 5}'},
    "nested_sequence": {"parameters": {"sequence_id": 31}},
}


def parameters(server: TritonServer, name: str, prompt: str, expected: str) -> dict[str, Any]:
    """Ask for a text by parameters of the request.

    Args:
        server: that runs the model.
        name: of the model.
        prompt: to continue.
        expected: of four likeliest tokens.
    """
    given = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    body: dict[str, Any] = {"text_input": prompt, **given}
    nested: dict[str, Any] = {"text_input": prompt, "parameters": given}
    with Client(server.grpc, name) as client:
        by_grpc = client.ask(prompt, parameters=given)
        unknown = client.ask(prompt, parameters={"top_q": 1})
        timed = client.ask(prompt, timeout=7)
    return {
        "equal": {
            "grpc": by_grpc.text == expected,
            "generate": _generate(server, name, body)["text_output"] == expected,
            "generate_nested": _generate(server, name, nested)["text_output"] == expected,
            "generate_stream": _streamed(server, name, {**body, "stream": True}) == expected,
        },
        "errors": {
            "grpc_unknown_name": unknown.error,
            "grpc_timeout": timed.error,
            **{
                case: _generate(server, name, {"text_input": prompt, **more}).get("error")
                for case, more in _WRONG.items()
            },
        },
    }


def unloading(server: TritonServer, name: str) -> dict[str, Any]:
    """Send two texts in one tensor, which Triton refuses, and unload the model.

    Triton keeps a model while a stream of gRPC is open that has asked it, whatever was answered.
    """
    client = grpc.InferenceServerClient(server.grpc)
    tensor = grpc.InferInput("text_input", [2], "BYTES")
    tensor.set_data_from_numpy(np.array([b"a", b"b"], object))
    said: queue.Queue[str] = queue.Queue()
    client.start_stream(lambda result, error: said.put(str(error)))
    client.async_stream_infer(name, [tensor])
    error = said.get(timeout=60)
    other = grpc.InferenceServerClient(server.grpc)
    other.unload_model(name)
    while_open = _is_unloaded(other, name, 3)
    client.stop_stream()
    return {
        "error": error,
        "while_a_stream_is_open": while_open,
        "behind_it": _is_unloaded(other, name, 20),
    }


def _is_unloaded(client: grpc.InferenceServerClient, name: str, seconds: float) -> bool:
    end = time.perf_counter() + seconds
    while _state(client, name) != "UNAVAILABLE":
        if time.perf_counter() > end:
            return False
        time.sleep(0.05)
    return True


def _state(client: grpc.InferenceServerClient, name: str) -> str:
    index = client.get_model_repository_index()
    return next(str(model.state) for model in index.models if model.name == name)


def _generate(server: TritonServer, name: str, body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = httpx.post(
        f"http://{server.http}/v2/models/{name}/generate", json=body, timeout=60
    ).json()
    return found


def _streamed(server: TritonServer, name: str, body: dict[str, Any]) -> str:
    answer = httpx.post(
        f"http://{server.http}/v2/models/{name}/generate_stream", json=body, timeout=60
    )
    events = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    return "".join(json.loads(event.removeprefix("data: "))["text_output"] for event in events)
