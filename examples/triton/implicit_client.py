"""Writes text by the bare graph in Triton, whose state the server carries; tokens are chosen here.

pip install 'tritonclient[grpc]' tokenizers
python implicit_client.py --url 127.0.0.1:8001 --model demo_implicit \\
    --tokenizer demo/tokenizer.json "It is a truth"
"""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Iterator, Sequence

import numpy as np
import tritonclient.grpc as triton
from tokenizers import Tokenizer


def logits_behind(
    client: triton.InferenceServerClient,
    model: str,
    ids: Sequence[int],
    sequence: str,
    *,
    start: bool = False,
    end: bool = False,
) -> np.ndarray:
    """Return the logits (V,) behind a sequence that goes on by some tokens.

    Args:
        client: of the server.
        model: its name there.
        ids: at most a chunk of the bundle's.
        sequence: of the state that the server carries.
        start: the sequence begins; its state has nothing in it.
        end: the server forgets the state.
    """
    array = np.array([ids], np.int64)
    given = triton.InferInput("input_ids", list(array.shape), "INT64")
    given.set_data_from_numpy(array)
    result = client.infer(
        model, [given], sequence_id=sequence, sequence_start=start, sequence_end=end
    )
    return result.as_numpy("logits").reshape(-1)


def chosen(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """Return a token: the likeliest at temperature 0, else one that is drawn."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()).astype(np.float64) / temperature
    weights = np.exp(scaled)
    return int(rng.choice(len(weights), p=weights / weights.sum()))


def written(
    client: triton.InferenceServerClient,
    model: str,
    prompt: Sequence[int],
    count: int,
    *,
    chunk: int,
    temperature: float,
    ends: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yield the tokens that a model writes behind a prompt.

    Args:
        client: of the server.
        model: its name there.
        prompt: token ids, at least one.
        count: tokens to write, at least one.
        chunk: ids of one request at most.
        temperature: 0 for the likeliest token.
        ends: token ids that end the text.
    """
    sequence, rng = str(uuid.uuid4()), np.random.default_rng()
    for begin in range(0, len(prompt), chunk):
        piece = prompt[begin : begin + chunk]
        logits = logits_behind(client, model, piece, sequence, start=begin == 0)
    token = prompt[-1]
    try:
        for number in range(count):
            token = chosen(logits, temperature, rng)
            if token in ends:
                return
            yield token
            if number + 1 < count:
                logits = logits_behind(client, model, [token], sequence)
    finally:
        # The server keeps the state of a sequence, and its place, until it ends.
        logits_behind(client, model, [token], sequence, end=True)


def main() -> None:
    """Write a text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--model", default="demo_implicit")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json of the bundle")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=256, help="chunk_size of the bundle")
    parser.add_argument("--temperature", type=float, default=0)
    parser.add_argument("--end", type=int, action="append", default=[], help="id that ends a text")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(arguments.tokenizer)
    ids = tokenizer.encode(arguments.text).ids
    with triton.InferenceServerClient(arguments.url) as client:
        tokens = list(
            written(
                client, arguments.model, ids, arguments.tokens, chunk=arguments.chunk,
                temperature=arguments.temperature, ends=frozenset(arguments.end),
            )
        )  # fmt: skip
    print(tokenizer.decode([*ids, *tokens]))


if __name__ == "__main__":
    try:
        main()
    except triton.InferenceServerException as error:
        raise SystemExit(f"error: {error}") from None
