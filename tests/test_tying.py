"""Checkpoints that hold two tensors where config.json ties them to one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.support.families import CASES, WINDOW
from lminf_export import ModelError, export, load
from lminf_export.checkpoint import tying
from lminf_export.verify.validate import validate

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BY_NAME = {case.model_type: case for case in CASES}
TOKENS = [5, 3, 8, 1, 2, 9]


def fine_tuned(folder: Path, model_type: str = "llama", *, head: str = "other", **changes) -> Path:
    """Write a model whose config ties, with a head: "other", "same", or "same" in bfloat16."""
    case = BY_NAME[model_type]
    replace(case, changes={**case.changes, "tie_word_embeddings": True, **changes}).save(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    tensors[HEAD] = tensors[EMBEDDING].clone()
    if head == "other":
        tensors[HEAD] += torch.randn_like(tensors[HEAD]) * 0.3
    if head == "half":
        tensors[HEAD] = tensors[HEAD].bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    return folder


def stock_logits(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.sampled
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "cohere"])
def test_both_are_kept_as_transformers_keeps_them(model_type, tmp_path):
    folder = fine_tuned(tmp_path / "m", model_type)
    bundle = export(folder, tmp_path / "b", window_size=WINDOW)
    model = load(bundle.path)
    logits = model.forward([TOKENS], model.new_state())[0]
    wanted = stock_logits(folder)
    assert np.abs(logits - wanted).max() < 1e-5 * np.ptp(wanted)
    [notice] = [text for text in bundle.manifest.notices if "config.json ties" in text]
    assert HEAD in notice
    assert EMBEDDING in notice
    assert json.loads((bundle.path / "config.json").read_text())["tie_word_embeddings"] is False
    assert validate(bundle.path).passed
    assert validate(bundle.path, model=str(folder)).differing_weights == ()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["same", "half"])
def test_equal_ones_stay_one(head, tmp_path):
    folder = fine_tuned(tmp_path / "m", head=head)
    bundle = export(folder, tmp_path / "b", window_size=WINDOW)
    assert not bundle.manifest.notices
    [weights] = bundle.manifest.files_of("weights")
    assert len({EMBEDDING, HEAD} & load_file(bundle.path / weights).keys()) == 1


@pytest.mark.slow
def test_an_adapter_of_the_head_changes_the_head_of_the_checkpoint(tmp_path):
    folder = fine_tuned(tmp_path / "m")
    head = load_file(folder / "model.safetensors")[HEAD]
    down, up = torch.randn(4, head.shape[1]), torch.randn(head.shape[0], 4)
    (tmp_path / "a").mkdir()
    adapter = {"base_model.model.lm_head.lora_A.weight": down}
    adapter["base_model.model.lm_head.lora_B.weight"] = up
    save_file(adapter, tmp_path / "a" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["lm_head"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
    bundle = export(folder, tmp_path / "b", window_size=WINDOW, lora=tmp_path / "a")
    [weights] = bundle.manifest.files_of("weights")
    found = load_file(bundle.path / weights)
    torch.testing.assert_close(found[HEAD], head + up @ down, rtol=0, atol=1e-4)
    assert torch.equal(found[EMBEDDING], load_file(folder / "model.safetensors")[EMBEDDING])


def test_tensors_in_blocks_of_other_lengths_are_compared_element_by_element():
    class Blocks:
        dtype, shape = "F32", (10,)

        def __init__(self, *sizes: int, changed: int | None = None) -> None:
            self.numbers = torch.arange(10.0)
            if changed is not None:
                self.numbers[changed] += 1
            self.sizes = sizes

        def blocks(self):
            return iter(self.numbers.split(list(self.sizes)))

    assert tying._are_equal(Blocks(3, 7), Blocks(5, 4, 1))
    assert not tying._are_equal(Blocks(3, 7), Blocks(5, 4, 1, changed=9))
    assert not tying._are_equal(Blocks(3, 7), Blocks(5, 4, 1, changed=3))


def test_a_model_that_cannot_have_them_apart_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr("lminf_export.checkpoint.skeleton.Skeleton.of", lambda self, config: self)
    with pytest.raises(ModelError, match="cannot have apart"):
        export(fine_tuned(tmp_path / "m"), tmp_path / "b", window_size=WINDOW)
    assert not (tmp_path / "b").exists()
