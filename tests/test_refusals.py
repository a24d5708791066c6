"""Models that cannot be exported are named as what they are, in one line that is true of them."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import CONFIG_MAPPING

import lminf_export
from lminf_export.checkpoint.source import open_source
from lminf_export.cli.main import cli
from lminf_export.errors import ConfigError, LminfError, ModelError, shortened
from lminf_export.export.decisions import check_cache_size
from lminf_export.models.registry import FAMILIES, find_family
from lminf_export.operator.bindings import LayerSpec
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import LambdaConfig, ring_capacity

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "pad_token_id": None,
}
# Model type → what its configuration changes, and what the message must say.
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "deepseek_v2": ({}, r"latent attention \(MLA\)"),
    "deepseek_v3": ({}, r"latent attention \(MLA\)"),
    "minicpm3": ({}, r"latent attention \(MLA\)"),
    "qwen3_next": ({"num_hidden_layers": 8}, "recurrent hybrid: 6 of its 8 layers"),
    "lfm2": ({"layer_types": ["full_attention"] + ["conv"] * 5}, "5 of its 6 layers"),
    "minimax": ({}, "recurrent hybrid: 3 of its 6 layers"),
    "recurrent_gemma": ({}, "recurrent hybrid: 4 of its 6 layers"),
    "jamba": ({"num_hidden_layers": 8}, "recurrent hybrid: 7 of its 8 layers"),
    "bamba": ({"attn_layer_indices": [2]}, "recurrent hybrid: 5 of its 6 layers"),
    "falcon_h1": ({}, "recurrent hybrid"),
    "mamba": ({}, "recurrent: its 6 layers"),
    "rwkv": ({}, "recurrent: its 6 layers"),
    "zamba2": ({"num_hidden_layers": 54}, "recurrent hybrid"),
    "t5": ({}, "encoder–decoder"),
    "bart": ({}, "encoder–decoder"),
    "whisper": ({}, "encoder–decoder"),
    "bert": ({}, "encoder only"),
    "modernbert": ({}, "encoder only"),
    "llama4_text": ({}, "chunked attention.*also attention temperature"),
    "gemma3n_text": ({"num_hidden_layers": 6, "num_kv_shared_layers": 2}, "the last 2 of its 6"),
    "diffllama": ({}, "differential attention"),
    "gpt2": ({"n_positions": 77}, "learned absolute positions: its table wpe has 77"),
    "opt": ({}, "learned absolute positions"),
    "gpt_neo": ({}, "learned absolute positions"),
    "minimax_m3_vl_text": ({}, "sparse attention"),
    "paligemma": ({}, "prefix LM: the whole prompt, image and text"),
    "idefics": ({}, "cross-attention: among its text layers"),
    "git": ({}, "learned absolute positions"),
    "gemma3n": ({}, r"the text model of gemma3n\) cannot be exported: shared keys and values"),
    "llama4": ({}, r"the text model of llama4\) cannot be exported: chunked attention"),
    "lfm2_vl": (
        {"text_config": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}},
        r"the text model of lfm2_vl\) cannot be exported: recurrent hybrid",
    ),
    "kimi_k25": ({}, r"the text model of kimi_k25\) cannot be exported: latent attention"),
    "florence2": ({}, "encoder–decoder"),
    "kosmos-2": ({}, "exists as a part of it only"),
    "clip": ({}, "several models in one"),
    "vit": ({}, "no causal language model"),
}


def plan(folder: Path) -> None:
    """Read a model's folder and plan its attention."""
    source = open_source(folder)
    find_family(source.model_type).plan(source.config, LambdaConfig(8))


def refused(folder: Path, content: dict[str, Any]) -> str:
    """Return the one line that a configuration is refused with."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError) as caught:
        plan(folder)
    message = str(caught.value)
    assert len(message) <= 300
    assert "\n" not in message
    assert "qwen3_moe" not in message  # the list of families is behind `lminf families`
    return message


@pytest.mark.parametrize("model_type", KINDS)
def test_a_model_is_named_as_what_it_is(model_type, tmp_path):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this version of transformers does not know it")
    changes, reason = KINDS[model_type]
    known = CONFIG_MAPPING[model_type]().to_dict()
    sizes = {k: v for k, v in SMALL.items() if k in known} | changes
    content = {"model_type": model_type, **sizes}
    message = refused(tmp_path / "m", content)
    assert model_type in message
    assert re.search(reason, message), message


TWO_WAY = [
    ("qwen2", {"is_causal": False}, "is_causal: false"),
    ("llama", {"is_causal": False}, "is_causal: false"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
    ("mistral", {"bidirectional": True}, "bidirectional: true"),
    ("mpt", {"attn_config": {"prefix_lm": True}}, "prefix LM"),
    ("qwen3", {"architectures": ["Qwen3BidirectionalModel"]}, "Qwen3BidirectionalModel"),
]


@pytest.mark.parametrize(("model_type", "setting", "reason"), TWO_WAY)
def test_a_model_that_sees_later_tokens_is_refused(model_type, setting, reason, tmp_path):
    assert reason in refused(tmp_path / "m", {"model_type": model_type, **SMALL, **setting})


def test_harmless_forms_of_these_settings_are_let_through(tmp_path):
    plain = {"is_causal": True, "use_bidirectional_attention": False, "is_decoder": False}
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL, **plain}))
    assert open_source(folder).model_type == "llama"


def deep(levels: int) -> str:
    return '{"model_type": "llama", "x": ' + "[" * levels + "]" * levels + "}"


LLAMA = {"model_type": "llama", **SMALL}
ABSURD: dict[str, str] = {
    "layers": json.dumps(LLAMA | {"num_hidden_layers": 2**31}),
    "head_dim": json.dumps(LLAMA | {"head_dim": 2**31}),
    "no vocabulary": json.dumps(LLAMA | {"vocab_size": 0}),
    "no width": json.dumps(LLAMA | {"hidden_size": 0}),
    "padding": json.dumps(LLAMA | {"pad_token_id": 128}),
    "padding below": json.dumps(LLAMA | {"pad_token_id": -129}),
    "dtype": json.dumps(LLAMA | {"dtype": ["float16"]}),
    "torch_dtype": json.dumps(LLAMA | {"torch_dtype": 16}),
    "deep": deep(10**5),
    "rather deep": deep(200),
    "negative": json.dumps(LLAMA | {"num_attention_heads": -4}),
    "not a number": json.dumps(LLAMA | {"rms_norm_eps": float("nan")}),
    "infinite": json.dumps(LLAMA)[:-1] + ', "rope_theta": 1e999}',
    "text": json.dumps(LLAMA | {"num_hidden_layers": "2"}),
    "boolean": json.dumps(LLAMA | {"num_hidden_layers": True}),
    "factor": json.dumps(LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 1e300}}),
    "groups": json.dumps(LLAMA | {"num_key_value_heads": 3}),
    "long type": json.dumps(LLAMA | {"model_type": "x" * 5000}),
    "experts": json.dumps(LLAMA | {"model_type": "mixtral", "num_local_experts": 2**31}),
    "window": json.dumps(LLAMA | {"model_type": "mistral", "sliding_window": 2**41}),
    "not UTF-8": '{"model_type": "llama\udce9"}',
}


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_configuration_ends_soon_in_one_line(name, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(ABSURD[name], errors="surrogateescape")
    start = time.process_time()
    with pytest.raises(LminfError) as caught:
        lminf_export.export(folder, tmp_path / "b", window_size=8)
    assert time.process_time() - start < 2
    assert len(str(caught.value)) <= 300
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_a_home_of_nobody_is_one_line(tmp_path):
    with pytest.raises(ModelError, match="home directory"):
        lminf_export.export("~no-such-user-here/x", tmp_path / "b")


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_a_name_that_no_file_system_takes_is_one_line(path, tmp_path):
    demo = Path("examples/demo-llama").resolve()
    for model, out in ((path, tmp_path / "b"), (demo, tmp_path / path)):
        with pytest.raises(LminfError) as caught:
            lminf_export.export(model, out)
        assert len(str(caught.value)) <= 300
    for function in (lminf_export.load, lminf_export.validate):
        with pytest.raises(LminfError):
            function(tmp_path / path)


def test_messages_are_cut_in_the_middle():
    text = "begin " + "x" * 500 + " end"
    assert len(str(LminfError(text))) == 290
    assert str(LminfError(text)).startswith("begin x")
    assert str(LminfError(text)).endswith("x end")
    assert shortened("a\n b") == "a b"


def contract_of(window: int, chunk: int = 256) -> GraphContract:
    layer = LayerSpec(2, 32, window, 16, window, ring_capacity(window, chunk))
    return GraphContract((layer,) * 6, "float32", None, 128)


def test_caches_that_cannot_be_loaded_are_refused_with_what_fits():
    settings = LambdaConfig(2**36)
    with pytest.raises(ConfigError, match=r"take 192\.0 TiB") as caught:
        check_cache_size(contract_of(2**36), settings, 1, 256, total=2**35)
    window = int(str(caught.value).split("up to ")[1].split()[0])
    check_cache_size(contract_of(window), LambdaConfig(window), 1, 256, total=2**35)
    with pytest.raises(ConfigError):
        check_cache_size(contract_of(window + 256), LambdaConfig(window + 256), 1, 256, total=2**35)


def test_a_trained_window_may_be_for_a_larger_machine():
    window = 2**26  # 192 GiB
    settings = LambdaConfig(window)
    check_cache_size(contract_of(window), settings, 1, window, total=2**35)
    with pytest.raises(ConfigError, match="max_batch_size=64"):
        check_cache_size(contract_of(window), settings, 64, window, total=2**35)


def test_a_chunk_that_takes_all_memory_is_named():
    settings = LambdaConfig(8, chunk_size=2**40)
    with pytest.raises(ConfigError, match="no window fits: lower chunk_size"):
        check_cache_size(contract_of(8, 2**40), settings, 1, 256, total=2**35)


def test_families_lists_every_tested_type():
    found = CliRunner().invoke(cli, ["families"])
    assert found.exit_code == 0
    assert all(name in found.output for name in FAMILIES)
    content = json.loads(CliRunner().invoke(cli, ["families", "--json"]).output)
    assert content["tested"] == sorted(FAMILIES)
