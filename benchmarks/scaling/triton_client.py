"""A client of the python backend's model, by gRPC streaming."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as grpc


@dataclass
class Answer:
    """The answer of a model.

    Attributes:
        text: all of it.
        ids: all token ids.
        finish_reason: "stop" or "length".
        num_cached_tokens: of the prompt.
        error: instead of the rest.
        parts: responses.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    num_cached_tokens: int = 0
    error: str | None = None
    parts: int = 0


class Client:
    """A stream to one model; one request at a time.

    Args:
        address: of the server.
        model: its name there.
    """

    def __init__(self, address: str, model: str) -> None:
        self._model = model
        self._client = grpc.InferenceServerClient(address)
        self._results: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: self._results.put((result, error)))

    def ask(
        self,
        text: str,
        *,
        sequence: int | str = 0,
        start: bool = False,
        end: bool = False,
        parameters: dict[str, Any] | None = None,
        timeout: int | None = None,
        **sampling: Any,
    ) -> Answer:
        """Ask, and read the answer to its end."""
        answer = Answer()
        request = {"parameters": parameters, "timeout": timeout}
        for part in self.parts(
            text, sequence=sequence, start=start, end=end, request=request, **sampling
        ):
            answer.parts += 1
            answer.text += part.text
            answer.ids += part.ids
            answer.finish_reason = part.finish_reason
            answer.num_cached_tokens = part.num_cached_tokens
            answer.error = part.error
        return answer

    def parts(
        self,
        text: str,
        *,
        sequence: int | str = 0,
        start: bool = False,
        end: bool = False,
        request: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> Iterator[Answer]:
        """Ask, and yield the answer as it comes; `request` has what is beside the tensors."""
        inputs = [
            _input("text_input", np.array([text.encode()], object), "BYTES"),
            _input("stream", np.array([True]), "BOOL"),
            _input("return_output_ids", np.array([True]), "BOOL"),
            _input(
                "sampling_parameters", np.array([json.dumps(sampling).encode()], object), "BYTES"
            ),
        ]
        self._client.async_stream_infer(
            self._model, inputs, sequence_id=sequence, sequence_start=start, sequence_end=end,
            enable_empty_final_response=True, **(request or {}),
        )  # fmt: skip
        while True:
            result, error = self._results.get(timeout=120)
            if error is not None:
                yield Answer(error=str(error))
                return
            if (found := result.as_numpy("text_output")) is not None:
                yield Answer(
                    found[0].decode("utf-8"),
                    result.as_numpy("output_ids").tolist(),
                    result.as_numpy("finish_reason")[0].decode(),
                    int(result.as_numpy("num_cached_tokens")[0]),
                )
            if result.get_response().parameters["triton_final_response"].bool_param:
                return

    def close(self) -> None:
        """End the stream."""
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _input(name: str, array: np.ndarray, kind: str) -> Any:
    found = grpc.InferInput(name, list(array.shape), kind)
    found.set_data_from_numpy(array)
    return found
