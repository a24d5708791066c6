"""Tiny models of the families without the attention interface, exported and decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.support.own_oracle import Rule, own_logits
from lminf_export import export, load

WINDOW, SINKS, LIMIT, CHUNK, TRAINED, VOCAB = 23, 5, 37, 7, 29, 131
LENGTHS = (5 * WINDOW + 2, 6 * WINDOW + 1)  # of the two texts of a batch
QUICK_LENGTHS = (2 * WINDOW + 4, 3 * WINDOW + 1)  # every ring has wrapped all the same
TOLERANCE = 2e-5  # of the logits' range: the contract for float32
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
FALCON = {
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "ffn_hidden_size": 92,
    "max_position_embeddings": TRAINED,
}

# Name → model type and the settings that make it a tiny one of its kind.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": (
        "gptj",
        {"n_embd": 70, "n_head": 5, "n_layer": 3, "rotary_dim": 6, "n_positions": TRAINED},
    ),
    # Its code splits heads into four parts, so twelve is as odd as it gets.
    "codegen": (
        "codegen",
        {"n_embd": 120, "n_head": 12, "n_layer": 2, "rotary_dim": 6, "n_positions": TRAINED},
    ),
    "mpt": (
        "mpt",
        {
            "d_model": 60,
            "n_heads": 12,
            "n_layers": 3,
            "max_seq_len": TRAINED,
            "attn_config": {"clip_qkv": 1.7, "softmax_scale": 0.31},
        },
    ),
    "bloom": ("bloom", {"hidden_size": 60, "n_head": 12, "n_layer": 3}),
    "falcon-7b": ("falcon", {**FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon-40b": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": (
        "falcon",
        {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
}


def make_config(name: str, **changes: Any) -> Any:
    model_type, settings = CASES[name]
    return CONFIG_MAPPING[model_type](**{**TOKENS, **settings, "initializer_range": 0.2, **changes})


def save(name: str, folder: Path, **changes: Any) -> Path:
    """Write a random model: no parameter is a constant, so that none can be forgotten."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if float(parameter.std()) == 0:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Exported:
    folder: Path
    graph: Path
    model: Any
    texts: list[np.ndarray]
    wanted: list[np.ndarray]


def export_case(name: str, folder: Path, lengths: tuple[int, ...] = LENGTHS) -> Exported:
    """Export a family's model into a folder, with two texts and what Λ-attention makes of them."""
    source = save(name, folder / "m")
    bundle = export(
        source,
        folder / "b",
        window_size=WINDOW,
        num_sink_tokens=SINKS,
        distance_limit=LIMIT,
        chunk_size=CHUNK,
    )
    rng = np.random.default_rng(7)
    texts = [rng.integers(0, VOCAB, length) for length in lengths]
    rule = Rule(WINDOW, SINKS, LIMIT)
    wanted = [own_logits(source, rule, torch.from_numpy(text)).numpy() for text in texts]
    return Exported(source, bundle.graph_path, load(folder / "b", threads=1), texts, wanted)


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.ptp(wanted))


def decode(exported: Exported, sizes: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """Feed both texts together, `sizes(remaining)` tokens of each in a step."""
    state, rows = exported.model.new_state(2), ([], [])
    total = np.array([len(text) for text in exported.texts])
    while (remaining := total - state.past_length).any():
        past, lengths = state.past_length.copy(), np.minimum(sizes(remaining), remaining)
        ids = np.zeros((2, max(1, int(lengths.max()))), np.int64)
        for row, text in enumerate(exported.texts):
            ids[row, : lengths[row]] = text[past[row] : past[row] + lengths[row]]
        logits = exported.model.forward(ids, state, lengths=lengths)
        for row in range(2):
            rows[row].append(logits[row, : lengths[row]])
    return [np.concatenate(row) for row in rows]
