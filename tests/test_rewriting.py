"""Rewriting: options and files, and that a mistake costs one line and leaves nothing behind."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto

import lminf_export
from lminf_export import ConfigError, ExportOptions, ModelError
from lminf_export.cli.export import export_command
from lminf_export.cli.main import cli
from lminf_export.rewriting.options import REWRITE_OPTIONS
from lminf_export.rewriting.planning import plan_layers
from tests.support import altered_graphs as altered
from tests.support.foreign_models import DATA, LAMBDA, tokens

SMALL = ("--window-size", 23, "--num-sink-tokens", 3, "--chunk-size", 7)


@pytest.fixture
def llama(foreign, tmp_path):
    """A model of optimum-onnx, to be changed."""
    return shutil.copytree(foreign.optimum("llama"), tmp_path / "source" / "llama")


@pytest.fixture
def external(llama):
    """The same with its weights in a file beside the graph."""
    model = onnx.load(str(llama / "model.onnx"))
    (llama / "model.onnx").unlink()
    onnx.save(
        model,
        str(llama / "model.onnx"),
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=0,
    )
    return llama


def run(*arguments):
    return CliRunner().invoke(export_command, [str(a) for a in arguments])


def refused(folder: Path, *arguments, out=None, words=()):
    """Run a rewrite that must fail: one line, exit 2, nothing left beside the destination."""
    target = out or folder.parent / "bundle"
    before = sorted(path.name for path in folder.parent.iterdir())
    result = run("--model", folder, "--out", target, *SMALL, *arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert sorted(path.name for path in folder.parent.iterdir()) == before


def change(folder: Path, alter) -> None:
    """Alter the graph of a folder."""
    model = onnx.load(str(folder / "model.onnx"))
    alter(model)
    onnx.save(model, str(folder / "model.onnx"))


def change_json(folder: Path, name: str, **changes) -> None:
    path = folder / name
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**found, **changes}))


def without_ids(model):
    model.graph.input.remove(altered.input_of(model, "input_ids"))
    altered.constant(model, "input_ids", [[1, 2, 3]], np.int64)


def three_rows(model):
    shape = altered.input_of(model, "position_ids").type.tensor_type.shape
    shape.dim.add().dim_param = "tokens"


def newer_opset(model):
    model.opset_import[0].version = 26


ADD, RENAME = altered.add_input, altered.rename
GRAPHS = {
    "no ids but embeddings": (
        lambda m: RENAME(m, "input_ids", "inputs_embeds"),
        ("inputs_embeds", "embedding"),
    ),
    "no ids": (without_ids, ("no input input_ids", "attention_mask")),
    "multimodal positions": (three_rows, ("position_ids", "three rows", "text model")),
    "merged": (
        lambda m: ADD(m, "use_cache_branch", TensorProto.BOOL, [1]),
        ("use_cache_branch", "decoder_with_past_model.onnx"),
    ),
    "a quantised cache": (
        lambda m: ADD(m, "past_int8", TensorProto.INT8, ["b", 2, "t", 8]),
        ("past_int8", "quantised", "INT8"),
    ),
    "an encoder": (
        lambda m: ADD(m, "encoder_hidden_states", TensorProto.FLOAT, ["b", "t", 8]),
        ("encoder_hidden_states", "rank 3", "expected input_ids"),
    ),
    "unknown heads": (
        lambda m: altered.leave_open(m, "past_key_values.0.key", 1, "heads"),
        ("past_key_values.0.key", "unknown number of heads"),
    ),
    "another state": (
        lambda m: ADD(m, "past_conv", TensorProto.FLOAT, ["b", 2, "t", 8]),
        ("past_conv", "no cache of keys or values", "another state"),
    ),
    "a shared cache": (altered.share_a_cache, ("past_key_values.0.key", "several attentions")),
    "no logits": (lambda m: RENAME(m, "logits", "scores"), ("no output logits", "scores")),
    "no attention": (altered.embedding_alone, ("attends nowhere", "GroupQueryAttention")),
    "another bias": (altered.bias_of_places, ("layers.0", "not linear in the distance")),
    "no mask": (altered.without_mask, ("layers.0", "sees later tokens", "causal")),
    "another product": (altered.cube_scores, ("layers.0", "in no known way")),
    "two soft caps": (altered.cap_first_layer, ("layers.1", "layers.0", "soft cap", "0.0, 2.0")),
    "another rotation": (altered.stretch_keys, ("layers.0", "than rotate pairs")),
    "itself hidden": (altered.hide_itself, ("layers.0", "hides a token from itself")),
    "a mask with holes": (altered.hide_every_other, ("layers.0", "mask that is no window")),
    "a temperature": (altered.sharpen_late_queries, ("layers.0", "a temperature by position")),
    "two products": (altered.two_products, ("layers.0", "behind 2 products")),
    "a curve": (altered.bend_scores, ("layers.0", "weighs the same product otherwise")),
    "late positions": (
        altered.positions_after_attention,
        ("Cast", "still reads position_ids", "learned position embeddings"),
    ),
    "a mask by content": (
        altered.bias_of_words,
        ("layers.0", "depends on tokens besides by its queries, keys and values"),
    ),
    "a newer opset": (newer_opset, ("opset 26", "newer than 24")),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_is_not_understood_is_refused_in_one_line(name, llama):
    alter, words = GRAPHS[name]
    change(llama, alter)
    refused(llama, words=words)


def test_learned_positions_are_refused_by_their_name(foreign, tmp_path):
    folder = shutil.copytree(foreign.optimum("gpt2"), tmp_path / "gpt2")
    refused(folder, words=("/transformer/Add", "adds embeddings of positions", "training length"))


@pytest.mark.slow
def test_a_graph_that_is_asked_how_many_logits_it_gives_is_asked_which(llama, tmp_path):
    """Its own choice of rows is gone: the input stood for it."""
    plain = lminf_export.rewrite(llama, tmp_path / "plain", **LAMBDA)
    change(llama, altered.keep_last_logits)
    kept = lminf_export.rewrite(llama, tmp_path / "kept", **LAMBDA)
    found, wanted = (
        model.forward(tokens(61, plain.manifest.vocab_size), model.new_state())
        for model in map(lminf_export.load, (kept.path, plain.path))
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.fixture
def wrong_scale(monkeypatch):
    """A plan that is wrong by a factor of the logits, as a mistake of ours would be."""

    def plan(*arguments):
        found = plan_layers(*arguments)
        return replace(found, scales=tuple(1.5 * scale for scale in found.scales))

    monkeypatch.setattr("lminf_export.rewriting.run.plan_layers", plan)


def test_the_check_refuses_a_graph_that_is_not_the_original(llama, wrong_scale):
    words = ("not the original", "over 23 tokens", "--no-check", "nothing was written")
    refused(llama, words=words)


def test_without_the_check_it_is_written(llama, wrong_scale):
    result = run("--model", llama, "--out", llama.parent / "b", *SMALL, "--no-check")
    assert result.exit_code == 0, result.output


def remove_config(folder):
    (folder / "config.json").unlink()
    change(folder, lambda m: altered.leave_open(m, "past_key_values.0.key", 3, "dim"))


def two_graphs(folder):
    shutil.copyfile(folder / "model.onnx", folder / "second.onnx")
    (folder / "model.onnx").rename(folder / "first.onnx")


def no_graph(folder):
    (folder / "model.onnx").write_bytes(b"no graph at all")


def damaged(folder):
    path = folder / "model.onnx"
    name = b"/model/layers.0/input_layernorm/Pow_output_0"
    assert name in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(name, b"\xff" + name[1:]))


FILES = {
    "a name that is no text": (damaged, ("model.onnx is damaged", "no text")),
    "two graphs": (two_graphs, ("several graphs, first.onnx and second.onnx", "--model")),
    "a damaged graph": (no_graph, ("model.onnx", "is not an ONNX model")),
    "a model that is no table": (
        lambda folder: change_json(folder, "genai_config.json", model=[1]),
        ("genai_config.json is damaged", "its model is no table"),
    ),
    "no head dimension": (remove_config, ("past_key_values.0.key", "head dimension")),
    "another number of layers": (
        lambda folder: change_json(folder, "config.json", num_hidden_layers=3),
        ("describes 3 layers", "attends 2 times"),
    ),
    "other heads": (
        lambda folder: change_json(folder, "config.json", num_key_value_heads=4),
        ("config.json describes 4 query heads and 4 key/value heads of 8", "4 and 2 of 8"),
    ),
    "a decoder that is no table": (
        lambda folder: change_json(folder, "genai_config.json", model={"decoder": 3}),
        ("genai_config.json is damaged", "its decoder is no table"),
    ),
    "no size of heads": (
        lambda folder: change_json(
            folder, "genai_config.json", model={"decoder": {"head_size": "eight"}}
        ),
        ("head_size", "'eight'"),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_do_not_fit_are_refused_in_one_line(name, llama):
    alter, words = FILES[name]
    alter(llama)
    refused(llama, words=words)


def test_a_missing_graph_is_refused(tmp_path):
    (tmp_path / "source").mkdir()
    refused(tmp_path / "source" / "model.onnx", words=("model.onnx", "no such file"))


def test_a_tokenizer_that_is_no_folder_is_refused(llama):
    missing = llama.parent / "missing"
    refused(llama, "--tokenizer", missing, words=("tokenizer", "is no folder", "tokenizer.json"))


def test_a_tokenizers_folder_that_holds_none_is_refused(llama):
    (llama / "empty").mkdir()
    refused(llama, "--tokenizer", llama / "empty", words=("'", "holds no tokenizer", "config.json"))


@pytest.mark.slow
def test_a_configuration_of_another_vocabulary_is_noticed(llama, tmp_path):
    change_json(llama, "config.json", vocab_size=63)
    notice = "the graph scores 64 tokens and config.json has a vocabulary of 63"
    result = run("--model", llama, "--out", tmp_path / "b", "--dry-run", *SMALL)
    assert notice in result.stdout
    assert "weights       in the graph" in result.stdout
    bundle = lminf_export.rewrite(llama, tmp_path / "b", check=False, **LAMBDA)
    assert any(notice in line for line in bundle.manifest.notices)


def test_an_empty_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (lminf_export.rewrite, lminf_export.export):
        with pytest.raises(ModelError, match="an empty path"):
            call("", tmp_path / "b")
    result = run("--model", "", "--out", tmp_path / "b")
    assert result.exit_code == 2
    assert "an empty path" in result.stderr


def test_export_names_rewrite_for_a_folder_of_an_onnx_model(llama, tmp_path):
    with pytest.raises(ModelError, match=r"ONNX model, model\.onnx, .*lminf_export\.rewrite"):
        lminf_export.export(llama, tmp_path / "b")
    (llama / "config.json").unlink()
    with pytest.raises(ModelError, match=r"ONNX model, model\.onnx: .*lminf_export\.rewrite"):
        lminf_export.export(llama, tmp_path / "b")


COMMANDS = {
    "generate": ("--prompt", "x"),
    "chat": (),
    "bench": (),
    "serve": (),
    "validate": (),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_run_bundles_say_how_an_onnx_model_becomes_one(command, llama):
    for model in (llama, llama / "model.onnx"):
        result = CliRunner().invoke(cli, [command, str(model), *COMMANDS[command]])
        assert result.exit_code == 2
        assert "an ONNX model, model.onnx; make a bundle of that by lminf-export" in result.stderr
        assert result.stderr.count("\n") == 1


def test_inspect_asks_for_the_file_of_a_graph_beside_a_checkpoint(llama):
    shutil.copy(DATA / "llama" / "checkpoint" / "model.safetensors", llama)
    result = CliRunner().invoke(cli, ["inspect", str(llama)])
    assert result.exit_code == 2
    assert "to inspect that, name its file, model.onnx" in result.stderr
    assert CliRunner().invoke(cli, ["inspect", str(llama / "model.onnx")]).exit_code == 0


def test_a_checkpoint_is_no_onnx_model(tmp_path):
    with pytest.raises(ModelError, match="is no ONNX model"):
        lminf_export.rewrite(DATA / "llama" / "checkpoint", tmp_path / "b")


def test_weights_that_are_missing_are_named(external):
    (external / "model.onnx_data").unlink()
    refused(external, words=("model.onnx_data", "missing", "copy the whole model"))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345678\n"


def test_weights_that_are_cut_are_named_with_what_is_needed(external):
    path = external / "model.onnx_data"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    refused(external, words=("model.onnx_data", f"has {size - 1:,} bytes", f"{size:,}", "again"))
    path.write_bytes(LFS)
    refused(external, words=("model.onnx_data", "pointer of Git LFS", "git lfs pull"))
    path.write_bytes(b"")
    refused(external, words=("model.onnx_data", "has 0 bytes"))


@pytest.mark.parametrize(
    ("content", "words"), [(b"", ("it is empty",)), (LFS, ("Git LFS", "git lfs pull"))]
)
def test_a_graph_without_content_is_no_onnx_model(content, words, llama):
    (llama / "model.onnx").write_bytes(content)
    refused(llama, words=("is not an ONNX model", *words))
    result = CliRunner().invoke(cli, ["inspect", str(llama)])
    assert result.exit_code == 2
    assert all(word in result.stderr for word in ("is not an ONNX model", *words))


@pytest.mark.parametrize("place", ["../model.onnx_data", "/tmp/model.onnx_data"])
def test_weights_outside_of_the_folder_are_refused(place, external):
    model = onnx.load(str(external / "model.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place
    onnx.save(model, str(external / "model.onnx"))
    refused(external, words=("model.onnx_data", "not a plain name in its folder"))


@pytest.mark.slow
def test_a_rotation_of_one_regime_takes_no_other(llama):
    words = ("rope_regime=long", "does not depend on the length", "leave it out")
    refused(llama, "--rope-regime", "long", words=words)
    (llama / "config.json").unlink()
    words = ("rope_regime=long", "no rotation of this graph depends", "leave it out")
    refused(llama, "--rope-regime", "long", words=words)


OTHER_OPTIONS = {
    "dtype": ("--dtype", "float16"),
    "quantize": ("--quantize", "int8"),
    "kv_cache_dtype": ("--kv-cache-dtype", "int8"),
    "lora": ("--lora", "adapter"),
    "revision": ("--revision", "main"),
    "cache_dir": ("--cache-dir", "cache"),
    "trust_remote_code": ("--trust-remote-code",),
    "allow_pickle": ("--allow-pickle",),
    "calibrate": ("--calibrate", DATA / "README.md"),
}


DETAILS = {
    "block-size": 32,
    "lm-head": "int8",
    "embeddings": "full",
    "accuracy-level": 1,
    "quantize-form": "qdq",
}


@pytest.mark.parametrize("name", DETAILS)
def test_details_of_quantisation_are_refused_as_quantisation_is(name, llama):
    words = (name, "is for checkpoints", "a graph's weights stay as they are", "quantise the graph")
    refused(llama, f"--{name}", DETAILS[name], words=words)


def test_a_text_to_measure_quantisation_on_is_refused(llama):
    refused(llama, "--sample-text", DATA / "README.md", words=("sample_text", "is for checkpoints"))


def test_every_option_is_one_of_a_rewrite_or_refused_by_one():
    known = {field.name for field in fields(ExportOptions)} - {"model", "out"}
    assert known == {*REWRITE_OPTIONS, *OTHER_OPTIONS}


@pytest.mark.parametrize("name", OTHER_OPTIONS)
def test_options_of_checkpoints_are_refused_with_a_reason(name, llama):
    refused(llama, *OTHER_OPTIONS[name], words=(f"{name}: is for checkpoints", "ONNX model: "))


def test_rewrite_has_its_options_in_its_signature_and_takes_no_other(llama, tmp_path):
    parameters = inspect.signature(lminf_export.rewrite).parameters
    assert {*parameters} == {"model", "out", "progress", *REWRITE_OPTIONS}
    for name in REWRITE_OPTIONS:
        default = next(f.default for f in fields(ExportOptions) if f.name == name)
        assert parameters[name].default == default
    with pytest.raises(TypeError, match=r"rewrite\(\) got an unexpected keyword argument 'dtype'"):
        lminf_export.rewrite(llama, tmp_path / "b", dtype="float16")
    with pytest.raises(ConfigError, match="weights='odd'"):
        lminf_export.rewrite(llama, tmp_path / "b", weights="odd")


def test_a_dry_run_says_what_it_would_write_and_writes_nothing(llama):
    target = llama.parent / "bundle"
    result = run("--model", llama, "--out", target, *SMALL, "--dry-run")
    assert result.exit_code == 0, result.output
    for word in ("23 tokens", "model.onnx", "float32", "nothing was written"):
        assert word in result.output
    assert not target.exists()


def test_json_holds_the_manifest(llama):
    result = run("--model", llama, "--out", llama.parent / "b", *SMALL, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    manifest = found.get("manifest", found)
    assert manifest["source"]["name"] == "llama"
    assert manifest["source"]["rewritten"]["file"] == "model.onnx"
    assert manifest["source"]["rewritten"]["producer"].startswith("pytorch")
    assert manifest["lambda_config"]["window_size"] == 23


def logits(bundle):
    model = lminf_export.load(bundle.path, threads=1)
    return model.forward(tokens(60, model.vocab_size), model.new_state())


@pytest.mark.parametrize("weights", ["copy", "link"])
def test_weights_are_copied_or_linked_as_asked(weights, external, tmp_path):
    bundle = lminf_export.rewrite(external, tmp_path / "b", weights=weights, **LAMBDA)
    (name,) = bundle.manifest.files_of("weights")
    source, written = external / "model.onnx_data", bundle.path / name
    assert os.path.samefile(source, written) == (weights == "link")
    assert written.read_bytes() == source.read_bytes()
    assert bundle.manifest.linked_files == ((name,) if weights == "link" else ())
    assert any("hard links" in notice for notice in bundle.manifest.notices) == (weights == "link")
    before = (external / "model.onnx").read_bytes()
    assert np.isfinite(logits(bundle)).all()
    assert (external / "model.onnx").read_bytes() == before  # the original is as it was


def test_weights_on_another_disk_are_not_linked(external, monkeypatch):
    def refuse(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    refused(
        external,
        *("--weights", "link"),
        words=("model.onnx_data", "cannot be linked", "one disk", "--weights copy"),
    )


@pytest.mark.slow
def test_the_file_and_its_folder_are_the_same_model(llama, tmp_path):
    found = [
        logits(lminf_export.rewrite(model, tmp_path / name, check=False, **LAMBDA))
        for name, model in (("a", llama), ("b", llama / "model.onnx"))
    ]
    assert (found[0] == found[1]).all()


def test_a_bundle_has_the_tokenizer_and_configuration_of_the_folder_given(llama, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for path in llama.iterdir():
        if path.suffix == ".json":
            path.rename(texts / path.name)
    bundle = lminf_export.rewrite(llama, tmp_path / "b", tokenizer=texts, check=False, **LAMBDA)
    for name in ("tokenizer.json", "config.json"):
        assert (bundle.path / name).read_bytes() == (texts / name).read_bytes()
    assert bundle.manifest.model_type == "llama"
    assert bundle.manifest.eos_token_ids == (2,)


def test_a_graph_alone_is_enough(llama, tmp_path):
    for path in llama.glob("*.json"):
        path.unlink()
    bundle = lminf_export.rewrite(llama, tmp_path / "b", window_size=23)
    assert bundle.manifest.model_type == "onnx"
    assert not bundle.manifest.files_of("tokenizer")
    assert np.isfinite(logits(bundle)).all()


def test_a_destination_that_exists_is_kept(llama):
    target = llama.parent / "bundle"
    assert run("--model", llama, "--out", target, *SMALL).exit_code == 0
    before = (target / "lminf.json").read_bytes()
    refused(llama, words=("bundle", "--force"))
    assert (target / "lminf.json").read_bytes() == before


@pytest.mark.slow
def test_a_rewritten_graph_is_not_rewritten_again(llama, tmp_path):
    bundle = lminf_export.rewrite(llama, tmp_path / "b", **LAMBDA)
    graph = shutil.copytree(bundle.path, tmp_path / "again") / "model.onnx"
    with pytest.raises(ModelError, match="attends through lminf already"):
        lminf_export.rewrite(graph, tmp_path / "c")


def test_a_folder_of_transformers_js_is_found(llama, tmp_path):
    (llama / "onnx").mkdir()
    (llama / "model.onnx").rename(llama / "onnx" / "model.onnx")
    bundle = lminf_export.rewrite(llama, tmp_path / "b", check=False, **LAMBDA)
    assert bundle.manifest.source.name == "llama"
    assert bundle.manifest.files_of("tokenizer")


@pytest.mark.slow
def test_a_link_to_the_graph_that_the_user_names_is_followed(external, tmp_path):
    (tmp_path / "links").mkdir()
    direct, second = tmp_path / "links" / "l.onnx", tmp_path / "links" / "m.onnx"
    direct.symlink_to("../source/llama/model.onnx")
    second.symlink_to("l.onnx")
    for link in (direct, second):
        bundle = lminf_export.rewrite(link, tmp_path / "b", check=False, force=True, **LAMBDA)
        assert bundle.manifest.source.name == "llama"
        assert bundle.manifest.files_of("weights") == ["model.onnx_data"]
        assert bundle.manifest.files_of("tokenizer")


@pytest.mark.slow
def test_a_link_of_the_hubs_cache_has_its_weights_beside_it(external, tmp_path):
    cache = tmp_path / "models--o--n"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    (snapshot / "onnx").mkdir(parents=True)
    for index, path in enumerate(sorted(external.iterdir())):
        path.rename(blobs / f"{index:064x}")
        place = "onnx/" if path.name.startswith("model.onnx") else ""
        up = "../" * (2 + bool(place))
        (snapshot / f"{place}{path.name}").symlink_to(f"{up}blobs/{index:064x}")
    link = tmp_path / "l.onnx"
    link.symlink_to(snapshot / "onnx" / "model.onnx")
    for model in (snapshot, snapshot / "onnx" / "model.onnx", link):
        bundle = lminf_export.rewrite(model, tmp_path / "b", check=False, force=True, **LAMBDA)
        assert bundle.manifest.files_of("weights") == ["model.onnx_data"]
        assert bundle.manifest.files_of("tokenizer")


def test_a_graph_in_capital_letters_is_found(llama, tmp_path):
    (llama / "model.onnx").rename(llama / "MODEL.ONNX")
    bundle = lminf_export.rewrite(llama, tmp_path / "b", check=False, **LAMBDA)
    assert bundle.manifest.source.rewritten.file == "MODEL.ONNX"


def test_weights_in_the_graph_are_not_said_to_be_links(llama, tmp_path):
    bundle = lminf_export.rewrite(llama, tmp_path / "b", weights="link", check=False, **LAMBDA)
    assert not any("hard links" in notice for notice in bundle.manifest.notices)
    assert any("nothing is linked" in notice for notice in bundle.manifest.notices)
    assert bundle.manifest.linked_files == ()
