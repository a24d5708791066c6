"""Contestants beside the kernels: copies, and other attention on as many keys.

They attend to a plain cache of W + N keys: no ring, no limit on distance, nothing to append. So
each of them does a little less than the kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from scripts.gpu.workloads import Workload

Maker = Callable[[], Callable[[], None]]

COPY = "copy"
SDPA = "torch SDPA, same keys"
FULL = "torch SDPA, full context"


def yardsticks(device: str, workload: Workload, copies: int) -> dict[str, Maker]:
    """Return what makes each contestant that this machine can run.

    Args:
        device: "cuda", or "cpu" with the emulation, where torch's attention and copy are left.
        workload: the layer.
        copies: layers each of them works through; with the full context it is one.
    """
    w, found = workload, {}
    found[SDPA] = lambda: _sdpa(device, w, w.keys, copies, "FLASH_ATTENTION")
    found[COPY] = lambda: _copy(device, w, copies)
    if w.full_context:
        found[FULL] = lambda: _sdpa(device, w, w.full_context, 1, "FLASH_ATTENTION")
    if device != "cuda":
        return found
    found["torch SDPA by cuDNN, same keys"] = lambda: _sdpa(
        device, w, w.keys, copies, "CUDNN_ATTENTION"
    )
    found["compiled FlexAttention, same keys"] = lambda: _flex(w, copies)
    if importlib.util.find_spec("triton"):
        found["copy in Triton"] = lambda: _triton_copy(w, copies)
        if w.steps == 1:
            found["decode in Triton, same keys"] = lambda: _triton_decode(w, copies)
    if importlib.util.find_spec("flashinfer"):
        found["FlashInfer, same keys"] = lambda: _flashinfer(w, copies)
    if importlib.util.find_spec("flash_attn_interface"):
        found["FlashAttention 3, same keys"] = lambda: _flash_attention_3(w, copies)
    return found


def _tensors(device: str, w: Workload, keys: int, copies: int) -> list[list[Tensor]]:
    """Queries (B, H, S, D), keys and values (B, G, keys, D) of every layer."""

    def random(heads: int, length: int) -> Tensor:
        return torch.randn(w.batch, heads, length, w.head_dim, dtype=w.dtype, device=device)

    return [
        [random(w.heads, w.steps), random(w.kv_heads, keys), random(w.kv_heads, keys)]
        for _ in range(copies)
    ]


def _sdpa(device: str, w: Workload, keys: int, copies: int, backend: str) -> Callable[[], None]:
    layers = _tensors(device, w, keys, copies)

    def work() -> None:
        for query, key, value in layers:
            scaled_dot_product_attention(query, key, value, enable_gqa=w.heads != w.kv_heads)

    def restricted() -> None:
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
            work()

    return restricted if device == "cuda" else work


def _flex(w: Workload, copies: int) -> Callable[[], None]:
    from torch.nn.attention.flex_attention import flex_attention

    layers = _tensors("cuda", w, w.keys, copies)
    torch._dynamo.reset()  # every workload is compiled for its own sizes
    compiled = torch.compile(flex_attention, dynamic=False)

    def work() -> None:
        for query, key, value in layers:
            compiled(query, key, value, enable_gqa=w.heads != w.kv_heads)

    return work


def _flashinfer(w: Workload, copies: int) -> Callable[[], None]:
    """Its kernels for one sequence; several have a paged cache there, of pages of 16 tokens."""
    import flashinfer

    layers = _tensors("cuda", w, w.keys, copies)
    if w.batch == 1:
        flat = [[x[0].transpose(0, 1).contiguous() for x in layer] for layer in layers]

        def single() -> None:
            for query, key, value in flat:
                if w.steps == 1:
                    flashinfer.single_decode_with_kv_cache(query[0], key, value)
                else:
                    flashinfer.single_prefill_with_kv_cache(query, key, value)

        return single
    page = 16
    pages = -(-w.keys // page)
    caches = [
        torch.randn(w.batch * pages, 2, page, w.kv_heads, w.head_dim, dtype=w.dtype, device="cuda")
        for _ in range(copies)
    ]
    scratch = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(scratch, "NHD")
    starts = torch.arange(w.batch + 1, dtype=torch.int32, device="cuda") * pages
    indices = torch.arange(w.batch * pages, dtype=torch.int32, device="cuda")
    last = torch.full((w.batch,), w.keys - (pages - 1) * page, dtype=torch.int32, device="cuda")
    wrapper.plan(
        starts, indices, last, w.heads, w.kv_heads, w.head_dim, page,
        q_data_type=w.dtype, kv_data_type=w.dtype,
    )  # fmt: skip

    def batched() -> None:
        for (query, _, _), cache in zip(layers, caches, strict=True):
            wrapper.run(query[:, :, 0], cache)

    return batched


def _flash_attention_3(w: Workload, copies: int) -> Callable[[], None]:
    from flash_attn_interface import flash_attn_with_kvcache

    layers = _tensors("cuda", w, w.keys, copies)
    by_token = [[x.transpose(1, 2).contiguous() for x in layer] for layer in layers]
    lengths = torch.full((w.batch,), w.keys, dtype=torch.int32, device="cuda")

    def work() -> None:
        for query, key, value in by_token:
            flash_attn_with_kvcache(query, key, value, cache_seqlens=lengths)

    return work


def _copy(device: str, w: Workload, copies: int) -> Callable[[], None]:
    pairs = _copy_pairs(device, w, copies)

    def work() -> None:
        for source, target in pairs:
            target.copy_(source)

    return work


def _triton_copy(w: Workload, copies: int) -> Callable[[], None]:
    from scripts.gpu.triton_kernels import copy

    pairs = _copy_pairs("cuda", w, copies)

    def work() -> None:
        for source, target in pairs:
            copy(source, target)

    return work


def _triton_decode(w: Workload, copies: int) -> Callable[[], None]:
    from scripts.gpu.triton_kernels import Decode

    layers = _tensors("cuda", w, w.keys, copies)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    decode = Decode(w.batch, w.heads, w.kv_heads, w.keys, w.head_dim, multiprocessors)

    def work(keep: Any = layers) -> None:
        for query, key, value in keep:
            decode(query, key, value)

    return work


def _copy_pairs(device: str, w: Workload, copies: int) -> list[list[Tensor]]:
    count = w.key_bytes // 2
    return [
        [torch.randn(count, dtype=torch.float32, device=device).half() for _ in range(2)]
        for _ in range(copies)
    ]
