"""Multimodal models: their text model is exported, equal to the whole model on text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.support.wrappers import BY_NAME, CASES, WrapperCase
from lminf_export import Bundle, ModelError, export, load, validate
from lminf_export.checkpoint.opening import load_model, open_checkpoint
from lminf_export.checkpoint.source import open_source
from lminf_export.cli.export import export_command
from lminf_export.cli.inspect import inspect_command
from lminf_export.models.wrappers import PLAIN_TYPES, TESTED_WRAPPERS
from tests.support.tiny_models import save_tokenizer

SETTINGS: dict[str, Any] = {"window_size": 23, "num_sink_tokens": 5, "chunk_size": 7}
TOLERANCE = 2e-5
LENGTH = 20
TOKENS = np.random.default_rng(0).integers(3, 100, LENGTH)


@torch.no_grad()
def logits_of(model: Any) -> np.ndarray:
    return model(input_ids=torch.from_numpy(TOKENS[None])).logits[0].float().numpy()


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.ptp(wanted))


def text_model(folder: Path) -> Any:
    """Load the text model of a wrapper's folder as an export and a validation read it."""
    return load_model(open_checkpoint(open_source(folder)), torch.float32, None)


def is_known(case: WrapperCase) -> bool:
    """Whether this version of transformers has the type, around the same text model."""
    if case.model_type not in CONFIG_MAPPING or case.text_type not in CONFIG_MAPPING:
        return False
    text = CONFIG_MAPPING[case.model_type]().get_text_config(decoder=True).model_type
    return PLAIN_TYPES.get(text, text) == case.text_type


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model_type)
def test_the_text_model_is_the_whole_model_on_text(case, tmp_path):
    if not is_known(case):
        pytest.skip("this version of transformers does not know it")
    whole = case.build()
    wanted = logits_of(whole)
    if case.scale:
        wanted = wanted * getattr(whole.config.get_text_config(), case.scale)
    for is_old in (True, False):  # names of the hub, and of transformers 5
        folder = tmp_path / f"{is_old}"
        case.write(whole, folder, is_old=is_old)
        source = open_source(folder)
        assert (source.model_type, source.wrapper) == (case.text_type, case.model_type)
        assert error(logits_of(text_model(folder)), wanted) < TOLERANCE


def test_every_tested_wrapper_has_a_case():
    assert {*TESTED_WRAPPERS} == {*BY_NAME}


OTHER_EOS = 77  # of the whole model; its text model names 2


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A Gemma 3 of images and text in a folder "m", and its text model in a bundle "b"."""
    folder = tmp_path_factory.mktemp("gemma3")
    source = BY_NAME["gemma3"].save(folder / "m")
    save_tokenizer(source, 131)
    change_config(source, eos_token_id=[2, OTHER_EOS])
    (source / "generation_config.json").unlink(missing_ok=True)
    export(source, folder / "b", **SETTINGS)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run(command: Any, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(x) for x in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_a_bundle_says_whose_text_model_it_is(exported):
    manifest = Bundle.open(exported / "b").manifest
    assert manifest.model_type == "gemma3_text"
    assert manifest.source.wrapper == "gemma3"
    assert any("text only: this is the text model of a gemma3" in x for x in manifest.notices)
    assert manifest.eos_token_ids == (2, OTHER_EOS)
    assert "text part of" in run(inspect_command, exported / "b")
    assert "`gemma3` model; it reads text only" in (exported / "b" / "README.md").read_text()
    arguments = ("--model", exported / "m", "--out", exported / "c", "--window-size", 23)
    shown = run(export_command, *arguments, "--dry-run")
    assert "text part of  a gemma3 model" in shown
    assert "text only" in shown


def test_a_bundle_computes_what_the_whole_model_does_and_validates(exported):
    whole = AutoModelForImageTextToText.from_pretrained(exported / "m", dtype=torch.float32)
    model = load(exported / "b")
    found = model.forward(TOKENS[None], model.new_state())[0]
    assert error(found, logits_of(whole.eval())) < TOLERANCE
    validate(exported / "b", model=exported / "m")
    validate(exported / "b")


@pytest.mark.slow
def test_a_bundle_is_a_text_model_of_transformers_and_can_be_exported_again(exported, tmp_path):
    content = json.loads((exported / "b" / "config.json").read_text())
    assert content["architectures"] == ["Gemma3ForCausalLM"]
    assert not any(name.endswith("_config") for name in content)
    text = AutoModelForCausalLM.from_pretrained(exported / "b", dtype=torch.float32)
    assert np.array_equal(logits_of(text.eval()), logits_of(text_model(exported / "m")))
    again = export(exported / "b", tmp_path / "b", **SETTINGS)
    assert again.manifest.source.wrapper is None


def test_tensors_of_other_modules_are_not_even_decoded(exported):
    checkpoint = open_checkpoint(open_source(exported / "m"))
    assert not any("vision" in name or "projector" in name for name in checkpoint.tensors)
    assert checkpoint.tensors.keys() <= checkpoint.skeleton.shapes.keys()


@pytest.mark.slow
def test_linked_weights_are_the_files_of_the_whole_model(exported):
    linked = export(exported / "m", exported / "linked", weights="link", **SETTINGS)
    ids = TOKENS[None]
    models = [load(path) for path in (linked.path, exported / "b")]
    assert np.array_equal(*(model.forward(ids, model.new_state()) for model in models))
    assert json.loads((linked.path / "config.json").read_text())["model_type"] == "gemma3"
    validate(linked.path)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "qwen2_5_omni_thinker"])
def test_embeddings_are_tied_where_the_whole_model_ties_them(model_type, outer, inner, tmp_path):
    whole = BY_NAME[model_type].build()
    whole.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["tie_word_embeddings"] = outer
    content["text_config"]["tie_word_embeddings"] = inner
    (tmp_path / "config.json").write_text(json.dumps(content))
    stock = type(whole).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert error(logits_of(text_model(tmp_path)), logits_of(stock)) < TOLERANCE


def test_a_text_config_without_a_type_is_what_transformers_makes_of_it(tmp_path):
    whole = BY_NAME["llava"].build()
    whole.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    kept = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    kept |= {"num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters"}
    content["text_config"] = {k: v for k, v in content["text_config"].items() if k in kept}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert open_source(tmp_path).model_type == "llama"
    assert error(logits_of(text_model(tmp_path)), logits_of(whole)) < TOLERANCE


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    BY_NAME["llava"].save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_file({"vision_tower.x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="holds no tensor of the text model of a llava model"):
        open_checkpoint(open_source(tmp_path))


def test_quantised_weights_of_a_wrapper_are_decoded_by_their_own_names(tmp_path):
    """Rows of int8 with a scale each, as compressed-tensors writes them, in the hub's names."""
    whole = BY_NAME["mistral3"].build()
    rounded = {}
    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            levels = (module.weight.detach() / scale).round()
            module.weight.data = levels * scale
            rounded[name] = levels.to(torch.int8), scale
    wanted = logits_of(whole)
    whole.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name, (levels, scale) in rounded.items():
        for part, inner in (("model.language_model.", "language_model.model."), ("model.", "")):
            if name.startswith(part):
                saved = inner + name.removeprefix(part)
                break
        assert tensors[f"{saved}.weight"].shape == levels.shape
        tensors[f"{saved}.weight"], tensors[f"{saved}.weight_scale"] = levels, scale
    save_file(tensors, path)
    change_config(
        tmp_path,
        quantization_config={"quant_method": "compressed-tensors", "format": "int-quantized"},
    )
    assert error(logits_of(text_model(tmp_path)), wanted) < TOLERANCE


ADAPTERS = {
    "text and images": {"target_modules": ["q_proj", "v_proj", "fc1"]},
    "a pattern with the wrapper's path": {
        "target_modules": r".*language_model.*\.(q_proj|down_proj)",
        "rank_pattern": {r"model\.language_model\.layers\.1\.self_attn\.q_proj": 2},
    },
    "saved modules": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_an_adapter_of_the_whole_model_is_merged(model_type, kind, tmp_path):
    whole = BY_NAME[model_type].build()
    whole.save_pretrained(tmp_path / "m")
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **ADAPTERS[kind]}
    adapted = get_peft_model(whole, LoraConfig(**settings))
    adapted.save_pretrained(tmp_path / "a")
    wanted = logits_of(adapted.merge_and_unload().eval())
    checkpoint = open_checkpoint(open_source(tmp_path / "m"), tmp_path / "a")
    found = load_model(checkpoint, torch.float32, None)
    assert error(logits_of(found), wanted) < TOLERANCE
    left_out = [x for x in checkpoint.notices if "that are not of the text model" in x]
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert bool(left_out) == any("vision" in name or "visual" in name for name in names)


def test_an_adapter_in_the_names_of_older_files_is_merged_too(tmp_path):
    whole = BY_NAME["llava"].build()
    whole.save_pretrained(tmp_path / "m")
    adapted = get_peft_model(
        whole, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    old = "base_model.model.language_model.model."
    tensors = {
        name.replace("base_model.model.model.language_model.", old): tensor
        for name, tensor in load_file(path).items()
        if "language_model" in name
    }
    save_file(tensors, path)
    checkpoint = open_checkpoint(open_source(tmp_path / "m"), tmp_path / "a")
    wanted = logits_of(adapted.merge_and_unload().eval())
    found = load_model(checkpoint, torch.float32, None)
    assert error(logits_of(found), wanted) < TOLERANCE


def test_an_adapter_of_other_modules_only_is_refused(tmp_path):
    whole = BY_NAME["llava"].build()
    whole.save_pretrained(tmp_path / "m")
    get_peft_model(whole, LoraConfig(target_modules=["fc1"])).save_pretrained(tmp_path / "a")
    with pytest.raises(ModelError, match="changes nothing of the text model of this llava model"):
        open_checkpoint(open_source(tmp_path / "m"), tmp_path / "a")


ODD: dict[str, dict[str, Any]] = {
    "a rotation of no known type": {"text_config": {"rope_parameters": {"rope_type": "llama"}}},
    "a width that heads do not divide": {"text_config": {"hidden_size": 1}},
    "an activation of no known name": {"vision_config": {"hidden_act": "x"}},
    "a type that is none": {"vision_config": {"model_type": {}}},
    "a tower of negative size": {"vision_config": {"hidden_size": -1}},
}


@pytest.mark.parametrize("kind", ODD)
def test_a_damaged_configuration_ends_in_one_line(kind, tmp_path):
    BY_NAME["mllama"].save(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for name, change in ODD[kind].items():
        content[name] |= change
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError) as caught:
        open_source(tmp_path)
    assert len(str(caught.value)) <= 300
    assert "\n" not in str(caught.value)
