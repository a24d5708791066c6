"""`lminf-export`: what it prints, and that a mistake costs one line and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from lminf_export import export
from lminf_export.cli.export import export_command
from tests.support.tiny_models import save_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("source") / "tiny-llama")


@pytest.fixture
def copied(llama, tmp_path):
    folder = tmp_path / "source" / "tiny-llama"
    shutil.copytree(llama, folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(export_command, [str(a) for a in arguments])


def fails(folder, *arguments, out=None, words=()):
    """Run an export that must fail: one line, exit 2, nothing left beside the destination."""
    place = folder if folder.is_dir() else folder.parent
    target = out if out is not None else place / "bundle"
    before = sorted(p.name for p in place.iterdir())
    result = run("--out", target, *arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert sorted(p.name for p in place.iterdir()) == before


def test_dry_run_says_what_it_would_write_and_writes_nothing(llama, tmp_path):
    result = run("--model", llama, "--out", tmp_path / "b", "--window-size", 20, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "20 tokens" in result.output
    assert "nothing was written" in result.output
    assert not list(tmp_path.iterdir())


def test_default_window_is_the_original_training_length(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    folder = save_llama(tmp_path / "m", rope_parameters=rope, max_position_embeddings=512)
    result = run("--model", folder, "--out", tmp_path / "b", "--dry-run")
    assert "window        64 tokens" in result.output


def test_a_long_training_length_is_capped_and_said(tmp_path):
    folder = save_llama(tmp_path / "m", max_position_embeddings=131072)
    result = run("--model", folder, "--out", tmp_path / "b", "--dry-run")
    assert "window        4096 tokens" in result.output
    assert "131072" in result.output


def test_unknown_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails(tmp_path, "--model", tmp_path / "nowhere", words=["nowhere"])
    fails(tmp_path, "--model", "no-such/model", words=["no-such/model"])


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("gpt2", ["learned absolute positions"]), ("mystery", ["mystery", "unknown to transformers"])],
)
def test_unsupported_families_say_which_are(model_type, words, copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": model_type, "architectures": ["MysteryForCausalLM"]}
    (copied / "config.json").write_text(json.dumps(config))
    fails(tmp_path, "--model", copied, words=[*words, "lminf families"])


@pytest.mark.parametrize("kind", ["no-such-scaling"])
def test_unsupported_rotary_scaling_is_refused(kind, copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    (copied / "config.json").write_text(json.dumps(config))
    fails(tmp_path, "--model", copied, words=["rotary scaling", kind])


def test_a_folder_without_config_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    fails(tmp_path, "--model", tmp_path / "empty", words=["config.json"])


def test_truncated_weights_are_found_before_anything_is_written(copied, tmp_path):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    fails(tmp_path, "--model", copied, words=["model.safetensors", "truncated"])


def edit_header(path, change):
    raw = path.read_bytes()
    count = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + count])
    change(header)
    text = json.dumps(header).encode().ljust(count)[:count]
    path.write_bytes(raw[:8] + text + raw[8 + count :])


def _shift_boundary(header):
    tensors = sorted((v["data_offsets"][0], k) for k, v in header.items() if k != "__metadata__")
    first, second = (header[name] for _, name in tensors[1:3])
    first["data_offsets"][1] += 40
    second["data_offsets"][0] += 40


def _overlap(header):
    header["model.norm.weight"]["data_offsets"] = [0, 240]


def _negative(header):
    header["model.norm.weight"]["data_offsets"] = [-240, 0]


def _wrong_type(header):
    header["model.norm.weight"]["dtype"] = ["F32"]


@pytest.mark.parametrize("change", [_shift_boundary, _overlap, _negative, _wrong_type])
def test_headers_that_do_not_tile_the_file_are_found(change, copied, tmp_path):
    edit_header(copied / "model.safetensors", change)
    fails(tmp_path, "--model", copied, words=["model.safetensors", "damaged"])


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 47, "head_dim": None},
        {"num_attention_heads": 0},
        {"rms_norm_eps": "x"},
        {"vocab_size": None},
        {"hidden_act": "nope"},
        {"model_type": ["llama"]},
        {"rope_parameters": "x"},
        {"eos_token_id": -1},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_model_is_refused_at_once(change, copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, **change}))
    (copied / "generation_config.json").unlink()
    fails(tmp_path, "--model", copied, "--dry-run")


@pytest.mark.slow
def test_a_stop_token_outside_the_vocabulary_stops_nothing(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    size = config["vocab_size"]
    (copied / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, size]}))
    (copied / "generation_config.json").unlink()
    result = run("--model", copied, "--out", tmp_path / "b", "--dry-run")
    assert result.exit_code == 0
    assert f"eos_token_id {size} is outside the vocabulary of {size}" in result.output
    bundle = export(copied, tmp_path / "b", window_size=32)
    assert bundle.manifest.eos_token_ids == (2,)


def test_a_null_quantisation_is_none(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert run("--model", copied, "--out", tmp_path / "b", "--dry-run").exit_code == 0


def test_a_builder_without_an_engine_is_a_mistake(llama, tmp_path):
    words = ["builder", "engine.plan"]
    fails(tmp_path, "--model", llama, "--builder", "tensorrt-rtx", words=words)


def test_two_checkpoints_in_a_folder_are_not_mixed(copied, tmp_path):
    shutil.copy(copied / "model.safetensors", copied / "a.safetensors")
    (copied / "model.safetensors").rename(copied / "b.safetensors")
    fails(tmp_path, "--model", copied, words=["b.safetensors", "keep one"])


@pytest.mark.parametrize("index", [{"a": 5}, {"a": ""}, {"a": ".."}, {"a": "../x.safetensors"}])
def test_a_damaged_index_is_found(index, copied, tmp_path):
    (copied / "model.safetensors").unlink()
    text = json.dumps({"weight_map": index})
    (copied / "model.safetensors.index.json").write_text(text)
    fails(tmp_path, "--model", copied, words=["model.safetensors.index.json"])


@pytest.mark.parametrize("arguments", [["--window-size", "abc"], ["--dtype", "int8"], ["--nope"]])
def test_a_wrong_option_costs_one_line(arguments):
    program = [sys.executable, "-c", "from lminf_export.cli.export import main; main()"]
    result = subprocess.run(
        [*program, "--model", "m", "--out", "o", *arguments], check=False, capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "--help" in result.stderr


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, b"\x05" + b"\0" * 7 + b"hello"])
def test_damaged_weights_are_found(content, copied, tmp_path):
    (copied / "model.safetensors").write_bytes(content)
    fails(tmp_path, "--model", copied, words=["model.safetensors"])


def test_a_missing_shard_is_named(tmp_path):
    folder = save_llama(tmp_path / "source" / "m", shard="60KB")
    next(iter(sorted(folder.glob("model-00002*")))).unlink()
    fails(tmp_path, "--model", folder, words=["model-00002"])


@pytest.mark.slow
def test_a_missing_tensor_is_named(copied, tmp_path):
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors")
    fails(tmp_path, "--model", copied, words=["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.slow
def test_a_tensor_of_another_shape_is_named(copied, tmp_path):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(61)
    save_file(tensors, copied / "model.safetensors")
    fails(tmp_path, "--model", copied, words=["model.norm.weight", "[61]", "[60]"])


@pytest.mark.slow
def test_values_beyond_float16_are_named(copied, tmp_path):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, copied / "model.safetensors")
    fails(tmp_path, "--model", copied, "--dtype", "float16", words=["model.norm.weight", "65504"])


def test_pickles_are_never_loaded(copied, tmp_path):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    fails(tmp_path, "--model", copied, words=["pytorch_model.bin", "safetensors"])


def test_quantised_checkpoints_that_cannot_be_read_are_refused(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (copied / "config.json").write_text(json.dumps(config))
    fails(tmp_path, "--model", copied, words=["bitsandbytes"])


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--window-size", 0, ["window_size=0", "at least 1"]),
        ("--num-sink-tokens", -1, ["num_sink_tokens=-1"]),
        ("--distance-limit", 3, ["distance_limit=3", "window_size=29"]),
        ("--chunk-size", 0, ["chunk_size=0"]),
        ("--max-batch-size", 0, ["max_batch_size=0"]),
    ],
)
def test_settings_outside_their_rule_are_named(option, value, words, llama, tmp_path):
    fails(tmp_path, "--model", llama, option, value, words=words)


def test_an_unknown_suffix_is_refused(llama, tmp_path):
    fails(tmp_path, "--model", llama, out=tmp_path / "out.xyz", words=[".xyz"])


def test_a_folder_that_is_no_bundle_is_left_alone(llama, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    fails(tmp_path, "--model", llama, "--force", out=tmp_path / "precious", words=["not a bundle"])
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(llama, tmp_path, monkeypatch):
    import errno

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    from lminf_export.export import background_weights

    monkeypatch.setattr(background_weights, "write_pieces", no_space)
    fails(tmp_path, "--model", llama, words=["space"])


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_that_loads(llama, tmp_path):
    code = (
        "import os, signal; from lminf_export import export;"
        "from lminf_export.export import background_weights;"
        "background_weights.write_pieces = lambda *a: os.kill(os.getpid(), signal.SIGKILL);"
        f"export({str(llama)!r}, {str(tmp_path / 'b')!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert result.returncode == -9
    assert not (tmp_path / "b").exists()
    assert run("--model", llama, "--out", tmp_path / "b").exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["b"], "the next export clears the remains"


@pytest.mark.slow
def test_a_hub_model_is_read_from_the_cache_at_its_revision(llama, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / commit
    shutil.copytree(llama, snapshot)
    reference = tmp_path / "hub" / "models--org--tiny" / "refs" / "v1"
    reference.parent.mkdir()
    reference.write_text(commit)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = (
        "from lminf_export import export;"
        f"print(export('org/tiny', {str(tmp_path / 'b')!r}, revision='v1', "
        f"cache_dir={str(tmp_path / 'hub')!r}).manifest.source)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert f"name='org/tiny' revision='{commit}'" in result.stdout


def test_remote_code_is_never_run_by_default(copied, tmp_path):
    marker = tmp_path / "source" / "ran"
    config = json.loads((copied / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: ...\n")
    run("--model", copied, "--out", tmp_path / "b")
    assert not marker.exists()


def test_help_is_readable():
    result = run("--help")
    assert result.exit_code == 0
    for option in (
        "--model", "--out", "--num-sink-tokens", "--window-size", "--distance-limit",
        "--chunk-size", "--dtype", "--builder", "--max-batch-size", "--revision", "--cache-dir",
        "--trust-remote-code", "--force", "--dry-run", "--verbose", "--quiet",
    ):  # fmt: skip
        assert option in result.output
    assert Path(__file__).name not in result.output
