"""The real model beside transformers and llama.cpp: decoding, prefill, memory, time to load.

The contestants of `benchmarks/peers`, in turns, with the real model's weights: transformers in
float32, llama.cpp on the GGUF itself with and without context shift, and exports of ours. Where
llama-cpp-python has an environment of its own, LMINF_LLAMA_PYTHON names that environment's Python.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import race
from benchmarks.peers.contestants import Child, missing, stand
from benchmarks.real.checkpoint import RealModel
from benchmarks.real.readings import DEFAULT, Readings

SHIFT = "llama.cpp q4_k_m, context shift"
CONTESTANTS = {
    "fp32": ("transformers fp32", "ours fp32", "ours fp32, int8 ring"),
    "quantized": ("llama.cpp q4_k_m", SHIFT, "ours int8", "ours int4"),
}
EXPORTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32-int8-ring": {"kv_cache_dtype": "int8"},
    "int8": {"quantize": "int8", "source_blocks": "requantize"},
    "int4": {"quantize": "int4"},  # the file's own blocks
}
CONTEXTS = (512, 2048, 8192, 32768, 131_072, 1_000_000)
# Longest context that a peer reads token by token; beyond it says so.
READ_LIMIT = 32768


def prepare(made: Readings, model: RealModel) -> Path:
    """Return the folder in which every contestant finds its weights."""
    folder = made.work / "speed"
    folder.mkdir(exist_ok=True)
    for name, changed in EXPORTS.items():
        _link(folder / f"ours-{name}", made.bundle({**DEFAULT, **changed}))
    if model.gguf is not None:
        _link(folder / "llama-q4_k_m.gguf", model.gguf)
    _link(folder / "checkpoint", model.path if model.path.is_dir() else _twin(made, model))
    return folder


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target.resolve())


def _twin(made: Readings, model: RealModel) -> Path:
    """Write the GGUF's float32 twin as transformers decodes it, unless it is there."""
    folder = made.work / "twin"
    if not folder.exists():
        import torch
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(
            model.path.parent, gguf_file=model.path.name, dtype=torch.float32
        )
        # What it was decoded from is of no account any more, and would keep it from being saved.
        loaded.hf_quantizer = None
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        loaded.save_pretrained(folder.with_suffix(".new"))
        folder.with_suffix(".new").rename(folder)
    return folder


def measure(
    made: Readings, model: RealModel, out: Path, threads: int, only: list[str] | None
) -> None:
    """Write the sections that are asked for, or all; each replaces what the file has of it.

    Args:
        made: where bundles are.
        model: the real model.
        out: the JSON.
        threads: of every contestant.
        only: names of sections, such as "decode-fp32"; None for all.
    """
    work = prepare(made, model)
    result: dict[str, Any] = {"sections": {}}
    if out.is_file():
        result = json.loads(out.read_text(encoding="utf-8"))
    for name, section in sections().items():
        if only is not None and name not in only:
            continue
        group = name.partition("-")[2]
        arguments = settings(work, threads, group)
        begun = time.perf_counter()
        found = section(list(CONTESTANTS[group]), arguments)
        result["sections"][name] = {
            **found,
            "threads": threads,
            "seconds": round(time.perf_counter() - begun, 1),
            "environment": race.environment_with_peers(),
        }
        told = {
            "benchmark": "the real model beside its peers",
            "model": model.described(),
            "lambda_config": DEFAULT,
            "sections": result["sections"],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sections() -> dict[str, Any]:
    """Return what can be measured: a function of contestants and settings for each section."""
    kinds = {"decode": race.decode, "prefill": race.prefill, "memory": race.memory}
    found: dict[str, Any] = {
        f"{kind}-{group}": function for kind, function in kinds.items() for group in CONTESTANTS
    }
    found["shift-quantized"] = shift
    return found


def settings(work: Path, threads: int, group: str) -> argparse.Namespace:
    """Return the settings of `benchmarks/peers/race.py` as they are here."""
    return argparse.Namespace(
        work=work, threads=threads, contestants=list(CONTESTANTS[group]), contexts=list(CONTEXTS),
        read_limit=READ_LIMIT, peers_at_once=None, rounds=5, tokens=8,
        prefill_tokens=2048, prefill_rounds=3,
    )  # fmt: skip


def shift(_: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Time one whole cycle of a context that is shifted: what a token costs, shifts included."""
    if reason := missing(SHIFT, arguments.work):
        return {"refused": reason}
    with Child(SHIFT, arguments.work, arguments.threads, 0) as child:
        child.ask("load")
        found = stand(child, 10**6)
        if "refused" in found:
            return found
        # From a full context: the first token shifts, and half the context is free again.
        times = child.ask("decode", tokens=1016)["times"]
    return {
        "ms_per_token": round(statistics.mean(times) * 1e3, 3),
        "median_ms": round(statistics.median(times) * 1e3, 3),
        "step_with_shift_ms": round(max(times) * 1e3, 3),
        "tokens": len(times),
    }
