"""LoRA adapters merged while weights are written: tensor by tensor what PEFT's own merge gives."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.support.families import CASES, WINDOW
from lminf_export import InputError, ModelError, export
from lminf_export.checkpoint.opening import open_checkpoint
from lminf_export.checkpoint.source import open_source
from lminf_export.cli.export import export_command
from lminf_export.verify.validate import validate

BY_NAME = {case.model_type: case for case in CASES}


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Both add short float32 products to float32 weights: a few roundings of the largest."""
    few_roundings = 4 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=few_roundings)


def save(model_type: str, folder: Path, **changes) -> Path:
    case = BY_NAME[model_type]
    return replace(case, changes={**case.changes, **changes}).save(folder)


def adapt(base: Path, out: Path, **settings) -> dict[str, torch.Tensor]:
    """Write a random adapter of PEFT; return what PEFT merges it to."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings})
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            if "modules_to_save" in name or name.endswith(".bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    adapted.save_pretrained(out)
    merged = adapted.merge_and_unload()
    return {name: tensor.clone() for name, tensor in merged.state_dict().items()}


def merged(base: Path, adapter: Path, **options) -> dict[str, torch.Tensor]:
    """What an export would write."""
    checkpoint = open_checkpoint(open_source(base), adapter, **options)
    tensors = checkpoint.skeleton.conversion.apply(checkpoint.tensors)
    return {n: torch.cat(list(x.blocks())).reshape(x.shape).float() for n, x in tensors.items()}


def assert_merged(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], base: Path):
    plain = load_file(base / "model.safetensors")
    changed = 0
    for name, tensor in found.items():
        assert_close(tensor, wanted[name].float())
        changed += name not in plain or not torch.equal(tensor, plain[name].float())
    assert changed


SETTINGS = {
    "a list": {"target_modules": ["q_proj", "v_proj"]},
    "a pattern": {"target_modules": r".*layers\.[02]\.(self_attn\.o_proj|mlp\.up_proj)"},
    "everything linear": {"target_modules": "all-linear"},
    "rank-stabilised": {"target_modules": ["k_proj"], "use_rslora": True},
    "ranks and factors by pattern": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, r".*\.2\.mlp\.down_proj": 7},
        "alpha_pattern": {"down_proj": 11},
    },
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "one layer": {
        "target_modules": ["up_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "all but some": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*1.*k_proj"},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "gate_proj"]},
    "fan in, fan out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    "magnitudes": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_merging_is_what_peft_merges(kind, tmp_path):
    base = save("llama", tmp_path / "m")
    wanted = adapt(base, tmp_path / "a", **SETTINGS[kind])
    assert_merged(merged(base, tmp_path / "a"), wanted, base)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
        ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
        ("qwen2", {"target_modules": ["k_proj"], "lora_bias": True}),
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
        ("gpt_neox", {"target_modules": ["query_key_value", "embed_in", "embed_out"]}),
        (
            "mixtral",
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            },
        ),
        ("gpt_oss", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
        ("qwen3_moe", {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_merging_into_other_families_is_what_peft_merges(model_type, settings, tmp_path):
    base = save(model_type, tmp_path / "m")
    wanted = adapt(base, tmp_path / "a", **settings)
    assert_merged(merged(base, tmp_path / "a"), wanted, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_is_added_in_float32_whatever_it_is_stored_in(dtype, tmp_path):
    base = save("llama", tmp_path / "m")
    wanted = adapt(base, tmp_path / "a", target_modules=["q_proj"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    exact = load_file(path)
    save_file({name: x.to(dtype) for name, x in exact.items()}, path)
    found = merged(base, tmp_path / "a")["model.layers.0.self_attn.q_proj.weight"]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    down, up = (exact[name.format(side)].to(dtype).float() for side in "AB")
    plain = load_file(base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert_close(found, plain + 1.5 * up @ down)
    assert not torch.equal(found, wanted["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_experts_one_by_one_is_merged_before_they_are_stacked(tmp_path):
    base = save("mixtral", tmp_path / "m")
    plain = load_file(base / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w3"
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = plain[f"{name}.weight"].shape
    down = torch.randn(4, inputs, generator=generator)
    up = torch.randn(outputs, 4, generator=generator)
    write_adapter(
        tmp_path / "a",
        {f"base_model.model.{name}.lora_{x}.weight": t for x, t in (("A", down), ("B", up))},
        target_modules=["w3"],
    )
    found = merged(base, tmp_path / "a")["model.layers.1.mlp.experts.gate_up_proj"]
    wanted = plain[f"{name}.weight"] + 1.5 * up @ down
    assert_close(found[3, outputs:], wanted)
    untouched = plain[name.replace("w3", "w1") + ".weight"]
    assert torch.equal(found[3, :outputs], untouched)


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **settings) -> Path:
    """Write an adapter by hand."""
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return folder


@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_an_adapter_of_one_of_two_tied_tensors_unties_them(module, tmp_path):
    base = save("llama", tmp_path / "m", tie_word_embeddings=True)
    adapt(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=[module])
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    [new] = [tensor for name, tensor in saved.items() if f"{module}.weight" in name]
    plain = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    found = merged(base, tmp_path / "a")
    changed = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    for name, tensor in changed.items():
        assert torch.equal(found[tensor], new if name == module else plain)
    bundle = export(base, tmp_path / "b", window_size=WINDOW, lora=tmp_path / "a")
    assert json.loads((bundle.path / "config.json").read_text())["tie_word_embeddings"] is False
    assert any("unties" in notice for notice in bundle.manifest.notices)
    assert validate(bundle.path).passed


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A base, an adapter of it, and the bundle of both."""
    folder = tmp_path_factory.mktemp("adapted")
    base = save("qwen3", folder / "m")
    adapt(base, folder / "tuned", target_modules=["q_proj", "down_proj"])
    target = ["--model", str(base), "--out", str(folder / "b"), "--window-size", str(WINDOW)]
    result = CliRunner().invoke(export_command, [*target, "--lora", str(folder / "tuned")])
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.slow
def test_the_manifest_names_the_adapter_and_no_path(adapted):
    text = (adapted / "b" / "lminf.json").read_text()
    assert json.loads(text)["source"] == {"name": "m", "revision": None, "adapter": "tuned"}
    assert str(adapted) not in text


def test_a_merged_bundle_is_validated_against_model_and_adapter_together(adapted):
    assert validate(adapted / "b").passed
    report = validate(adapted / "b", model=str(adapted / "m"), lora=adapted / "tuned")
    assert report.passed
    assert report.compared_with == "m with adapter tuned"
    with pytest.raises(InputError, match="adapter 'tuned' is merged into bundle 'b'; give it as"):
        validate(adapted / "b", model=str(adapted / "m"))
    with pytest.raises(InputError, match="give --model too"):
        validate(adapted / "b", lora=adapted / "tuned")


def test_another_adapter_than_the_merged_one_is_found(adapted, tmp_path):
    adapt(adapted / "m", tmp_path / "tuned", target_modules=["q_proj", "down_proj"], lora_alpha=7)
    report = validate(adapted / "b", model=str(adapted / "m"), lora=tmp_path / "tuned")
    assert not report.passed
    assert "model.layers.0.self_attn.q_proj.weight" in report.differing_weights


def refused(base: Path, adapter: Path, reason: str, **options) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        open_checkpoint(open_source(base), adapter, **options)
    assert "\n" not in str(caught.value)


def change_settings(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA; only LORA can be merged"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base model too"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is set"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"use_dora": True}, "lacks lora_magnitude_vector"),
        ({"r": 0}, "r=0 in adapter_config.json"),
        ({"r": "4"}, "r='4' in adapter_config.json"),
        ({"r": 8}, r"lora_A of .*has shape \[4, 92\], adapter_config.json asks for rank 8"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern in adapter_config.json must map"),
        ({"rank_pattern": {"(": 4}}, r"pattern '\(' in adapter_config.json is none"),
        ({"target_modules": 3}, "target_modules=3 in adapter_config.json: must be a list"),
        ({"target_modules": ["q_proj", "o_proj"]}, "targets model.layers.0.self_attn.o_proj"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line(changes, reason, adapted, tmp_path):
    shutil.copytree(adapted / "tuned", tmp_path / "a")
    change_settings(tmp_path / "a", **changes)
    refused(adapted / "m", tmp_path / "a", reason)


def test_an_adapter_of_another_model_is_refused(adapted, tmp_path):
    narrow = save("qwen3", tmp_path / "narrow", hidden_size=48)
    reason = r"has shape \[48, 92\], the adapter's change \[60, 92\]; it was trained on another"
    refused(narrow, adapted / "tuned", reason)
    shallow = save("qwen3", tmp_path / "shallow", num_hidden_layers=2)
    refused(
        shallow, adapted / "tuned", "changes model.layers.2.*which model 'shallow' does not have"
    )
    refused(save("phi3", tmp_path / "phi"), adapted / "tuned", "which model 'phi' does not have")


def test_an_incomplete_or_strange_adapter_is_refused(adapted, tmp_path):
    tensors = load_file(adapted / "tuned" / "adapter_model.safetensors")
    half = {k: v for k, v in tensors.items() if "lora_A" in k}
    refused(adapted / "m", write_adapter(tmp_path / "half", half), "lacks lora_B of")
    strange = {**tensors, "base_model.model.model.embed_tokens.token_adapter.x": torch.ones(2)}
    refused(adapted / "m", write_adapter(tmp_path / "strange", strange), "is of no known kind")
    larger = {**tensors, "base_model.model.lm_head.weight": torch.ones(133, 60)}
    reason = r"holds lm_head.weight of shape \[133, 60\], which model 'm' has as \[131, 60\]"
    wide = write_adapter(tmp_path / "wide", larger, target_modules=["q_proj", "down_proj"])
    refused(adapted / "m", wide, reason)
    (wide / "adapter_model.safetensors").write_bytes(b"\x05")
    refused(adapted / "m", wide, "truncated or damaged")
    (wide / "adapter_model.safetensors").unlink()
    refused(adapted / "m", wide, "has no adapter_model.safetensors")
    (wide / "adapter_config.json").write_text("{")
    refused(adapted / "m", wide, "is not valid JSON")
    refused(adapted / "m", tmp_path / "nowhere", "no such folder")
    refused(adapted / "m", tmp_path, r"has no adapter_config.json; it holds several \(half, stra")


@pytest.mark.filterwarnings("ignore")
def test_another_method_of_peft_is_refused(adapted, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(adapted / "m")
    targets = {"target_modules": ["k_proj"], "feedforward_modules": []}
    get_peft_model(model, IA3Config(**targets)).save_pretrained(tmp_path / "a")
    refused(adapted / "m", tmp_path / "a", "peft_type is IA3")


def test_a_pickled_adapter_is_read_only_when_asked_for(adapted, tmp_path):
    shutil.copytree(adapted / "tuned", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    torch.save(load_file(path), tmp_path / "a" / "adapter_model.bin")
    path.unlink()
    refused(adapted / "m", tmp_path / "a", r"adapter_model\.bin, a pickle.*--allow-pickle")
    found = merged(adapted / "m", tmp_path / "a", allow_pickle=True)
    wanted = merged(adapted / "m", adapted / "tuned")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_command_line_takes_one_adapter_and_says_what_is_one(adapted, tmp_path):
    base, tuned = str(adapted / "m"), str(adapted / "tuned")
    target = ["--out", str(tmp_path / "b"), "--window-size", "23", "--dry-run"]
    run = CliRunner().invoke(export_command, ["--model", base, "--lora", tuned, *target])
    assert run.exit_code == 0
    assert "adapter       tuned" in run.output
    twice = ["--model", base, "--lora", tuned, "--lora", tuned, *target]
    result = CliRunner().invoke(export_command, twice)
    assert result.exit_code == 2
    assert "one adapter can be merged, found 2" in result.output
    result = CliRunner().invoke(export_command, ["--model", tuned, *target])
    assert result.exit_code == 2
    assert "is an adapter; give the model it was trained on as --model" in result.output
