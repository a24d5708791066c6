"""transformers' Llama with SDPA and its caches, on the weights that a bundle was made of."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.gpu.onnxruntime_gpu import Run

DYNAMIC, STATIC, COMPILED = (
    "transformers, DynamicCache",
    "transformers, StaticCache",
    "transformers, StaticCache, compiled",
)
CONTESTANTS = (DYNAMIC, STATIC, COMPILED)
_CHUNK = 4096  # so that the prompt's activations fit
_WARM_UP, _STEPS = 3, 40


def run_contestant(run: Run, name: str, source: Path, context: int) -> dict[str, Any]:
    """Encode a context and decode behind it; a contestant that fails has its error instead.

    Args:
        run: settings.
        name: of CONTESTANTS.
        source: the checkpoint's folder.
        context: tokens.

    Returns:
        Seconds of encoding, milliseconds a token of decoding, and bytes on the device at most.
    """
    import torch

    torch.set_grad_enabled(False)
    device = "cuda" if run.on_gpu else "cpu"
    if run.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        return _measure(run, name, source, context, device)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return {"failed": f"{type(error).__name__}: {error}"[:600]}
    finally:
        gc.collect()
        if run.on_gpu:
            torch.cuda.empty_cache()


def _measure(run: Run, name: str, source: Path, context: int, device: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    dtype = torch.float16 if run.on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation="sdpa", device_map=device
    ).eval()
    steps = _STEPS if run.on_gpu else 4
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, context), generator=generator).to(device)
    length = context + _WARM_UP + steps
    cache: Any = (
        DynamicCache()
        if name == DYNAMIC
        else StaticCache(config=model.config, max_cache_len=length)
    )

    def forward(tokens: Any, position: int, call: Callable[..., Any]) -> Any:
        positions = torch.arange(position, position + tokens.shape[1], device=device)
        return call(
            input_ids=tokens,
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits

    start = time.perf_counter()
    for first in range(0, context, _CHUNK):
        forward(ids[:, first : first + _CHUNK], first, model)
    _wait(run)
    encoded = time.perf_counter() - start
    step: Callable[..., Any] = model
    if name == COMPILED:
        step = torch.compile(model, mode="reduce-overhead", fullgraph=False)
    token = torch.full((1, 1), 7, device=device)
    times = []
    for number in range(_WARM_UP + steps):
        start = time.perf_counter()
        forward(token, context + number, step).float().cpu()
        times.append(time.perf_counter() - start)
    return {
        "encode_seconds": encoded,
        "ms_per_token": statistics.median(times[_WARM_UP:]) * 1e3,
        "first_step_seconds": times[0],
        "peak_device_bytes": torch.cuda.max_memory_allocated() if run.on_gpu else None,
    }


def _wait(run: Run) -> None:
    if run.on_gpu:
        import torch

        torch.cuda.synchronize()
