"""Runs in llama-cpp-python's environment: makes a GGUF of another type, and reads tokens with it.

python llama_perplexity.py FILE TOKENS.npy NATS.npy [SOURCE TYPE]
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp
import numpy as np

_PIECE = 64
_TYPES = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


def quantize(source: str, kind: str, out: str) -> None:
    """Write a file of a type."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize, settings.nthread = _TYPES[kind], True, 1
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp made no {kind} of {source}")


def nats(path: str, tokens: np.ndarray) -> np.ndarray:
    """Return −log p of every token behind the first."""
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = len(tokens) + _PIECE, _PIECE, _PIECE
    settings.n_threads = settings.n_threads_batch = 1
    model = llama_cpp.llama_model_load_from_file(
        path.encode(), llama_cpp.llama_model_default_params()
    )
    context = llama_cpp.llama_init_from_model(model, settings)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(_PIECE, 0, 1)
    found = []
    for start in range(0, len(tokens) - 1, _PIECE):
        piece = tokens[start : min(start + _PIECE, len(tokens) - 1)]
        batch.n_tokens = len(piece)
        for i, token in enumerate(piece):
            batch.token[i], batch.pos[i] = int(token), start + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama.cpp could not decode")
        raw = llama_cpp.llama_get_logits(context)
        logits = np.ctypeslib.as_array(raw, (len(piece), size)).astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        targets = tokens[start + 1 : start + 1 + len(piece)]
        own = logits[np.arange(len(piece)), targets]
        found.append(np.log(np.exp(logits).sum(1)) - own)
    return np.concatenate(found)


def main() -> None:
    path, tokens, out, *made_of = sys.argv[1:]
    if made_of:
        quantize(*made_of, path)
    np.save(out, nats(path, np.load(tokens)))


if __name__ == "__main__":
    main()
