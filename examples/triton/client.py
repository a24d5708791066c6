"""Streams texts from a bundle in Triton, by gRPC, and goes on with a session.

pip install 'tritonclient[grpc]'
python client.py --url 127.0.0.1:8001 --model demo "It is a truth"
"""

from __future__ import annotations

import argparse
import json
import queue
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import tritonclient.grpc as triton


def tensor(name: str, values: list[Any], kind: str) -> triton.InferInput:
    """Return an input of one dimension."""
    numpy_types = {"BYTES": np.object_, "BOOL": np.bool_}
    array = np.array(values, numpy_types[kind])
    found = triton.InferInput(name, list(array.shape), kind)
    found.set_data_from_numpy(array)
    return found


def stream(
    client: triton.InferenceServerClient,
    results: queue.Queue[Any],
    model: str,
    text: str,
    sampling: dict[str, Any],
    **sequence: Any,
) -> Iterator[str]:
    """Yield an answer's text as it is written.

    Args:
        client: whose stream has been started with `results` as its callback's place.
        results: (result, error) of each response.
        model: its name at the server.
        text: to continue.
        sampling: fields of /v1/completions.
        sequence: sequence_id, sequence_start, sequence_end.
    """
    inputs = [
        tensor("text_input", [text.encode()], "BYTES"),
        tensor("stream", [True], "BOOL"),
        tensor("sampling_parameters", [json.dumps(sampling).encode()], "BYTES"),
    ]
    client.async_stream_infer(model, inputs, enable_empty_final_response=True, **sequence)
    while True:
        result, error = results.get()
        if error is not None:
            raise SystemExit(f"error: {error}")
        found = result.as_numpy("text_output")
        if found is not None:
            yield found[0].decode()
        if result.get_response().parameters["triton_final_response"].bool_param:
            return


def main() -> None:
    """Write a text, and go on with it in the same session."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    results: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(arguments.url) as client:
        client.start_stream(lambda result, error: results.put((result, error)))
        sampling = {"max_tokens": arguments.tokens, "temperature": 0}
        print(arguments.text, end="")
        session = str(uuid.uuid4())  # nobody else's
        for start, end in ((True, False), (False, True)):
            text = arguments.text if start else ""
            parts = stream(
                client, results, arguments.model, text, sampling,
                sequence_id=session, sequence_start=start, sequence_end=end,
            )  # fmt: skip
            for part in parts:
                print(part, end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        main()
    except triton.InferenceServerException as error:
        raise SystemExit(f"error: {error}") from None
