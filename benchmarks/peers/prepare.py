"""The same random weights in every contestant's own format; what is there already is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.support.checkpoints import SHAPES, write_checkpoint

WINDOW, SINKS = 2048, 16
MAX_POSITIONS = 2**20
OURS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}


def prepare(shape: str, work: Path, names: list[tuple[str, str]]) -> None:
    """Write whatever of a list of (kind, precision) is missing."""
    checkpoint = work / "checkpoint"
    _once(checkpoint, lambda to: write_checkpoint(to, SHAPES[shape], torch.float32, MAX_POSITIONS))
    for kind, precision in names:
        if kind.startswith("ours"):
            _once(work / f"ours-{precision}", partial(_export, checkpoint, precision))
        elif kind in ("genai", "genai-graph") and find_spec("onnxruntime_genai"):
            _once(work / f"genai-{precision}", partial(_genai, checkpoint, precision))
        elif kind == "llama.cpp" and find_spec("llama_cpp") and find_spec("gguf"):
            whole = work / "llama-f32.gguf"
            _once(whole, partial(_gguf, checkpoint))
            if precision != "f32":
                _once(work / f"llama-{precision}.gguf", partial(_quantize_gguf, whole))


def path_of(work: Path, kind: str, precision: str) -> Path:
    """Where a contestant's weights are."""
    names = {
        "ours": f"ours-{precision}",
        "ours-body": f"ours-{precision}",
        "rewritten": f"rewritten-{precision}",
        "transformers": "checkpoint",
        "genai": f"genai-{precision}",
        "genai-graph": f"genai-{precision}",
        "llama.cpp": f"llama-{precision}.gguf",
        "llama.cpp-shift": f"llama-{precision}.gguf",
    }
    return work / names[kind]


def _once(path: Path, write: Any) -> None:
    """Write a file or folder under another name first, so that half a one is not taken for it."""
    if path.exists():
        return
    print(f"preparing {path.name}", file=sys.stderr)
    partial = path.with_name(f"partial-{path.name}")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    write(partial)
    os.replace(partial, path)


def _export(checkpoint: Path, precision: str, to: Path) -> None:
    import lminf_export

    settings = OURS[precision]
    lminf_export.export(checkpoint, to, window_size=WINDOW, num_sink_tokens=SINKS, **settings)


def _genai(checkpoint: Path, precision: str, to: Path) -> None:
    cache = to.with_name("genai-cache")
    command = [
        *(sys.executable, "-m", "onnxruntime_genai.models.builder"),
        *("-m", "random", "-i", str(checkpoint), "-o", str(to), "-p", precision),
        *("-e", "cpu", "-c", str(cache)),
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    shutil.rmtree(cache, ignore_errors=True)


def _gguf(checkpoint: Path, to: Path) -> None:
    from gguf import GGUFWriter
    from safetensors import safe_open
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = GGUFWriter(to, "llama")
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(0)
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                array = file.get_tensor(name)
                if "q_proj" in name or "k_proj" in name:
                    array = _interleaved(array, heads if "q_proj" in name else kv_heads)
                writer.add_tensor(_gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Any, heads: int) -> Any:
    """Reorder a projection's rows from half-split to interleaved rotation."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, -1).swapaxes(1, 2).reshape(weight.shape)


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
}  # fmt: skip


def _gguf_name(name: str) -> str:
    for theirs, ours in _GGUF_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _quantize_gguf(whole: Path, to: Path) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(to).encode(), params):
        raise SystemExit(f"llama.cpp could not quantise {whole}")
