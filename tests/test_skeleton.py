"""A job asks transformers once for the model on the meta device, and once for its conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.support.families import CASES, CHUNK, SINKS, WINDOW
from lminf_export import export
from lminf_export.checkpoint.conversion import Conversion
from lminf_export.checkpoint.opening import open_checkpoint
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.checkpoint.source import open_source
from lminf_export.export.job import ExportOptions
from lminf_export.export.run import prepare
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.verify.validate import validate
from tests.support.tiny_models import llama_config, save_llama

SETTINGS: dict[str, Any] = {
    "window_size": WINDOW,
    "num_sink_tokens": SINKS,
    "chunk_size": CHUNK,
}


class Counts:
    """Calls since the last `take`: models built without numbers, conversions read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models = self.conversions = 0
        build, read = AutoModelForCausalLM.from_config, Conversion.of

        def counted_build(*arguments: Any, **settings: Any) -> Any:
            self.models += torch.empty(0).device.type == "meta"
            return build(*arguments, **settings)

        def counted_read(model: Any) -> Conversion:
            self.conversions += 1
            return read(model)

        monkeypatch.setattr(AutoModelForCausalLM, "from_config", counted_build)
        monkeypatch.setattr(Conversion, "of", counted_read)

    def take(self) -> tuple[int, int]:
        found = self.models, self.conversions
        self.models = self.conversions = 0
        return found


@pytest.fixture
def counts(monkeypatch):
    return Counts(monkeypatch)


def save_adapter(base: Path, out: Path, *targets: str) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=4, init_lora_weights=False, target_modules=list(targets))
    get_peft_model(model, settings).save_pretrained(out)
    return out


def store_as_fp8(folder: Path) -> None:
    """Store a model's projections in float8, with one scale for each matrix."""
    tensors, path = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_an_export_and_a_validation_build_one(tmp_path, counts):
    model = save_llama(tmp_path / "m")
    export(model, tmp_path / "b", dtype="float16", **SETTINGS)
    assert counts.take() == (1, 1)
    assert validate(tmp_path / "b", model=str(model)).passed
    assert counts.take() == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("embeddings", "needed"), [("auto", (1, 1)), ("full", (2, 2))])
def test_a_quantised_bundle_builds_one_unless_its_reference_is_untied(
    embeddings, needed, tmp_path, counts
):
    """A table in full under a quantised head is two tensors: another configuration."""
    model = save_llama(tmp_path / "m", tie_word_embeddings=True)
    quantize = QuantizeConfig("int4", accuracy_level=1, embeddings=embeddings)
    bundle = export(model, tmp_path / "b", quantize=quantize, **SETTINGS)
    assert counts.take() == (1, 1)
    assert validate(bundle.path, model=str(model)).passed
    assert counts.take() == needed


@pytest.mark.slow
def test_a_quantised_checkpoint_builds_one(tmp_path, counts):
    """However often it is loaded: as the reference, as the stock model, in two precisions."""
    model = save_llama(tmp_path / "m")
    store_as_fp8(model)
    bundle = export(model, tmp_path / "b", dtype="float16", **SETTINGS)
    assert counts.take() == (1, 1)
    assert validate(bundle.path, model=str(model)).passed
    assert counts.take() == (1, 1)


@pytest.mark.slow
def test_a_mixture_of_experts_builds_one(tmp_path, counts):
    case = next(case for case in CASES if case.model_type == "mixtral")
    model = case.save(tmp_path / "m")
    counts.take()
    bundle = export(model, tmp_path / "b", **SETTINGS)
    assert counts.take() == (1, 1)
    assert validate(bundle.path, model=str(model)).passed
    assert counts.take() == (1, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_builds_one_and_one_that_unties_embeddings_two(tmp_path, counts):
    for ties, targets, needed in (
        (False, ["q_proj"], (1, 1)),
        # The tied one's names are looked up to see whether the checkpoint holds both tensors.
        (True, ["q_proj", "lm_head"], (2, 2)),
    ):
        model = save_llama(tmp_path / f"m{ties}", tie_word_embeddings=ties)
        lora = save_adapter(model, tmp_path / f"a{ties}", *targets)
        counts.take()
        bundle = export(model, tmp_path / f"b{ties}", lora=lora, **SETTINGS)
        assert counts.take() == needed
        assert validate(bundle.path, model=str(model), lora=lora).passed
        assert counts.take() == needed


def test_a_skeleton_is_built_when_it_is_first_asked(tmp_path, counts):
    model = save_llama(tmp_path / "m")
    open_checkpoint(open_source(model))
    assert counts.take() == (0, 0)
    prepare(ExportOptions(model, tmp_path / "b", **SETTINGS))
    assert counts.take() == (1, 0)  # to see how the layers attend


def test_names_shapes_and_ties_do_not_depend_on_the_dtype():
    config = llama_config(tie_word_embeddings=True)
    full, half = Skeleton(config), Skeleton(config, torch.float16)
    assert full.groups == half.groups
    assert full.tied == half.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert full.shapes == half.shapes
    assert full.conversion.names == half.conversion.names


def test_only_another_tie_takes_another_skeleton():
    skeleton = Skeleton(llama_config(tie_word_embeddings=True))
    assert skeleton.of(llama_config(tie_word_embeddings=True)) is skeleton
    untied = skeleton.of(llama_config(tie_word_embeddings=False))
    assert untied.tied == ()
    assert untied.shapes == skeleton.shapes
