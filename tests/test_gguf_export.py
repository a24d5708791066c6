"""Exports of GGUF files: bundles like any other, in little memory, by every command."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.support.gguf_files import save_gguf
from lminf_export import export, load
from lminf_export.checkpoint.opening import open_checkpoint
from lminf_export.checkpoint.source import open_source
from lminf_export.cli.export import export_command
from lminf_export.cli.main import cli
from lminf_export.errors import ConfigError
from tests.support.memory import MIB, peak_of
from tests.support.tiny_models import save_llama

MERGED = "layers.1.self_attn.q_proj"
SETTINGS = {"window_size": 16, "num_sink_tokens": 4, "chunk_size": 8}
BYTES = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
TOKENIZER = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": BYTES,
    "tokenizer.ggml.scores": [0.0] * len(BYTES),
    "tokenizer.ggml.token_type": [3, 3, *(6,) * 256],
    "general.license": "mit",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama as a folder and as GGUF, with a tokenizer of bytes there, and bundles of both."""
    place = tmp_path_factory.mktemp("gguf")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}
    model = save_llama(place / "model", vocab_size=258, **sizes)
    save_gguf(model, place / "m.gguf", "F16", metadata=TOKENIZER)
    save_gguf(model, place / "q.gguf", "Q4_0", metadata=TOKENIZER)
    export(place / "q.gguf", place / "b", **SETTINGS)
    return place


def run(*words: object) -> str:
    command = export_command if words[0] == "export" else cli
    arguments = [str(word) for word in (words[1:] if words[0] == "export" else words)]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_a_bundle_from_gguf_holds_the_decoded_weights_and_a_plain_configuration(folder):
    bundle = folder / "b"
    checkpoint = open_checkpoint(open_source(folder / "q.gguf"))
    with safe_open(bundle / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            wanted = torch.cat(list(checkpoint.tensors[name].blocks())).float()
            assert torch.equal(file.get_tensor(name).flatten(), wanted)
    manifest = json.loads((bundle / "lminf.json").read_text())
    assert manifest["source"]["name"] == "q.gguf"
    assert str(folder) not in (bundle / "lminf.json").read_text()
    config = json.loads((bundle / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    assert 'license: "mit"' in (bundle / "README.md").read_text()


def test_a_bundle_from_gguf_is_a_model_for_transformers(folder):
    stock = AutoModelForCausalLM.from_pretrained(folder / "b", dtype=torch.float32)
    tokens = np.arange(3, 15)[None] * 5 % 258
    with torch.no_grad():
        wanted = stock(torch.from_numpy(tokens)).logits.numpy()
    model = load(folder / "b", threads=1)
    found = model.forward(tokens, model.new_state())
    assert np.abs(found - wanted).max() <= 2e-5 * np.ptp(wanted)


@pytest.mark.slow
def test_every_command_takes_the_file(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some words to read, and some more of them. " * 3)
    bundle = tmp_path / "b"
    run("export", "--model", folder / "m.gguf", "--out", bundle, "--window-size", 16)
    assert "llama" in run("inspect", bundle)
    assert "every tensor is that of" in run("validate", bundle, "--model", folder / "m.gguf")
    run("generate", bundle, "--prompt", "Some", "--max-new-tokens", 4)
    run("eval", "perplexity", bundle, "--text", text, "--max-tokens", 60)
    dry = run("export", "--model", folder / "m.gguf", "--out", tmp_path / "c", "--dry-run")
    assert "c" in dry
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_an_adapter_is_merged(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["layers.1.self_attn.q_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    parts = {name.format("A"): torch.randn(2, 64), name.format("B"): torch.randn(64, 2)}
    save_file(parts, adapter / "adapter_model.safetensors")
    plain = open_checkpoint(open_source(folder / "q.gguf"))
    merged = open_checkpoint(open_source(folder / "q.gguf"), adapter)
    key = "model.layers.1.self_attn.q_proj.weight"
    before, after = (torch.cat(list(x.tensors[key].blocks())) for x in (plain, merged))
    change = 2 * (parts[name.format("B")] @ parts[name.format("A")]).flatten()
    assert torch.allclose(after.float(), before.float() + change, atol=1e-5)
    bundle = export(folder / "q.gguf", tmp_path / "b", lora=adapter, **SETTINGS)
    assert bundle.manifest.source.adapter == "adapter"


def test_weights_that_are_decoded_are_not_linked(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"the weights of m.gguf are decoded from GGUF"):
        export(folder / "m.gguf", tmp_path / "b", weights="link", **SETTINGS)
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_memory_does_not_follow_the_size_of_a_tensor(tmp_path):
    rows, width = 16384, 2048  # 128 MiB in float32, 18 MiB in the file
    raw = np.random.default_rng(0).integers(0, 256, (rows, width // 32 * 18), dtype=np.uint8)
    raw.reshape(-1, 18)[:, 1] &= 0x3F  # scales up to 2
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code = f"""
from pathlib import Path
from lminf_export.tensors.gguf_header import read_gguf
from lminf_export.tensors.pieces import Converted
tensor = read_gguf(Path({str(tmp_path / "m.gguf")!r})).tensors["w"]
total = sum(len(chunk) for chunk in Converted("w", tensor, "float16").chunks())
assert total == {rows * width * 2}
"""
    taken = peak_of(code, "lminf_export.tensors.pieces", "gguf.quants", "torch.onnx")
    assert taken < 64 * MIB
