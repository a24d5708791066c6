"""A name of transformers' own code that is gone costs the families that use it, and no others."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import transformers

from benchmarks.support import own_families as own
from benchmarks.support.families import CASES
from lminf_export import DependencyError, ModelError, export
from lminf_export.bundle.versions import supported_versions
from lminf_export.checkpoint.conversion import Conversion
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.models.registry import FAMILIES, find_family
from lminf_export.operator.settings import LambdaConfig

MODULES = sorted({path.partition(".")[0] for path in FAMILIES.values()})
SMALL = {"window_size": 23, "num_sink_tokens": 5, "chunk_size": 7}
# Name of transformers, and the model types of which each needs it.
INTERNALS = {
    "models.gptj.modeling_gptj.create_causal_mask": {"gptj"},
    "models.codegen.modeling_codegen.CodeGenAttention": {"codegen"},
    "models.falcon.modeling_falcon.FalconRotaryEmbedding": {"falcon-7b", "falcon-40b", "falcon-rw"},
    "models.mpt.modeling_mpt.create_causal_mask": {"mpt"},
    "models.bloom.modeling_bloom.BloomAttention": {"bloom"},
}


def skeleton_of(name: str) -> Skeleton:
    """Build a family's model."""
    case = next((case for case in CASES if case.model_type == name), None)
    skeleton = Skeleton(own.make_config(name) if case is None else case.config())
    assert skeleton.model.training is False
    return skeleton


def plan(skeleton: Skeleton) -> None:
    """Plan a model's attention and open its code as an export does, without tracing."""
    family = find_family(skeleton.config.model_type)
    family.plan(skeleton.config, LambdaConfig(**SMALL), lambda: skeleton.model)
    with family.patched(skeleton.model):
        pass


def check_line(error: DependencyError, *parts: str) -> None:
    line = str(error)
    assert "\n" not in line
    assert len(line) <= 300
    for part in (f"transformers {transformers.__version__}", *parts):
        assert part in line


def without(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a name out of transformers, as a release that has renamed it."""
    module, _, name = path.rpartition(".")
    monkeypatch.delattr(import_module(f"transformers.{module}"), name)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "rotary"])
def test_an_adapter_that_does_not_load_leaves_all_others(module, monkeypatch):
    monkeypatch.setitem(sys.modules, f"lminf_export.models.{module}", None)
    for model_type, path in FAMILIES.items():
        if path.partition(".")[0] != module:
            assert model_type in find_family(model_type).model_types
            continue
        with pytest.raises(DependencyError) as caught:
            find_family(model_type)
        check_line(caught.value, model_type, supported_versions("transformers"))


@pytest.mark.slow
@pytest.mark.parametrize("module", [name for name in MODULES if name != "rotary"])
def test_no_family_imports_another(module):
    """The modules that a family's own imports bring along define no other family's class."""
    code = f"import sys, lminf_export.models.{module}; print(*sys.modules)"
    loaded = set(run_python(code).split())
    others = {f"lminf_export.models.{name}" for name in MODULES if name not in (module, "rotary")}
    assert not others & loaded


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("path", INTERNALS)
def test_a_name_that_is_gone_costs_the_models_that_need_it_only(path, monkeypatch):
    names = (*own.CASES, "llama", "gemma3_text", "mixtral", "hunyuan_v1_dense")
    skeletons = {name: skeleton_of(name) for name in names}
    without(path, monkeypatch)
    for name, skeleton in skeletons.items():
        if name not in INTERNALS[path]:
            plan(skeleton)
            continue
        with pytest.raises(DependencyError) as caught:
            plan(skeleton)
        check_line(caught.value, path.rpartition(".")[2], own.CASES[name][0])


@pytest.mark.slow
def test_every_other_family_plans_without_the_names_of_one(monkeypatch):
    for path in INTERNALS:
        without(path, monkeypatch)
    for case in CASES:
        plan(skeleton_of(case.model_type))


@pytest.mark.slow
def test_an_export_goes_on_where_another_family_is_broken(tmp_path, monkeypatch):
    sources = {name: own.save(name, tmp_path / name) for name in ("gptj", "mpt")}
    without("models.gptj.modeling_gptj.GPTJAttention", monkeypatch)
    monkeypatch.setitem(sys.modules, "lminf_export.models.gptj", None)
    assert export(sources["mpt"], tmp_path / "b", **SMALL).graph_path.is_file()
    with pytest.raises(DependencyError, match="gptj"):
        export(sources["gptj"], tmp_path / "c", **SMALL)
    assert not (tmp_path / "c").exists()


def test_a_name_read_while_the_model_runs_is_named_too(tmp_path, monkeypatch):
    """A module whose parts have other names is found when its forward is ours."""
    skeleton = Skeleton(own.make_config("mpt"))
    family = find_family("mpt")
    attention = skeleton.model.transformer.blocks[0].attn
    attention.fused = attention._modules.pop("Wqkv")
    tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    with family.patched(skeleton.model), pytest.raises(DependencyError) as caught:
        skeleton.model(input_ids=tokens, use_cache=False)
    check_line(caught.value, "MptAttention.Wqkv")


@pytest.mark.parametrize(
    ("path", "use"),
    [
        ("modeling_utils.ALL_ATTENTION_FUNCTIONS", lambda: skeleton_of("llama")),
        ("integrations.moe.ALL_EXPERTS_FUNCTIONS", lambda: skeleton_of("mixtral")),
        (
            "conversion_mapping.get_model_conversion_mapping",
            lambda: Conversion.of(Skeleton(own.make_config("mpt")).model),
        ),
    ],
    ids=["attention", "experts", "checkpoints"],
)
def test_names_that_all_need_are_named(path: str, use: Callable[[], None], monkeypatch):
    without(path, monkeypatch)
    with pytest.raises(DependencyError) as caught:
        use()
    check_line(caught.value, path.rpartition(".")[2])


def test_dense_models_need_no_interface_of_experts(monkeypatch):
    without("integrations.moe.ALL_EXPERTS_FUNCTIONS", monkeypatch)
    plan(skeleton_of("llama"))
    plan(skeleton_of("mpt"))


def test_a_dependency_error_is_no_model_error():
    """The probe words a ModelError as a refusal of the model, which a missing name is not."""
    assert not issubclass(DependencyError, ModelError)


def test_the_supported_versions_are_those_of_the_package():
    assert re.fullmatch(r">=[\d.]+(,<[\d.]+)?", supported_versions("transformers"))
    assert supported_versions("huggingface-hub")
    assert supported_versions("no-such-package") == ""
