"""Plans in Triton: which are refused and why, and what a configuration of one says."""

from __future__ import annotations

import pytest

from lminf_export.errors import InputError, LminfError, SessionError
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.triton.configs import tensorrt_config
from lminf_export.triton.plans import updated_in_place
from lminf_export.triton.repository import export_triton
from tests.support.tensorrt_doubles import bundle_with_plan

OUR_RUNTIME = {"bundle": "bundle/engine.plan"}


@pytest.fixture
def exported(tmp_path):
    return bundle_with_plan(tmp_path, plugin="beside")[0]


def test_a_plan_that_updates_caches_in_place_is_run_by_our_runtime(exported, tmp_path):
    out = export_triton(
        exported.path, tmp_path / "models", name="a", slots=3, backends=("tensorrt",),
        parameters={"max_new_tokens": "7"},
    )  # fmt: skip
    [model] = [path for path in out.iterdir() if path.is_dir()]
    assert model.name == "a_tensorrt"
    assert (model / "1" / "bundle" / "engine.plan").is_file()
    text = (model / "config.pbtxt").read_text()
    for words in (
        'backend: "python"',
        'key: "bundle" value { string_value: "bundle/engine.plan" }',
        f'key: "trust_hash" value {{ string_value: "{exported.manifest.manifest_sha256}" }}',
        'key: "slots" value { string_value: "3" }',
        'key: "max_new_tokens" value { string_value: "7" }',
        "caches in place",
        "NOT RUN",
    ):
        assert words in text
    for words in ("NOT RUN", "caches in place", "our runtime"):
        assert words in (out / "README.md").read_text()


def test_the_graph_and_the_plan_are_two_models(exported, tmp_path):
    out = export_triton(
        exported.path, tmp_path / "models", name="a", slots=1, backends=("python", "tensorrt")
    )
    places = {
        name: 'string_value: "bundle/engine.plan"' in (out / name / "config.pbtxt").read_text()
        for name in ("a", "a_tensorrt")
    }
    assert places == {"a": False, "a_tensorrt": True}


def test_two_models_get_no_folder_of_sessions_between_them(exported, tmp_path):
    def export(folder):
        return export_triton(
            exported.path, tmp_path / "models", slots=1, backends=("python", "tensorrt"),
            parameters={"session_folder": folder},
        )  # fmt: skip

    with pytest.raises(InputError, match="two models cannot have one folder"):
        export(str(tmp_path / "sessions"))
    assert export("sessions").is_dir()


def test_what_is_in_place_is_read_from_the_plan_s_record(exported):
    rings, sinks = exported.manifest.contract.ring_updates(), 0
    assert set(rings) <= set(updated_in_place(exported.manifest))
    for in_place in (True, False):
        engine = exported.manifest.engine.model_copy(update={"sinks_in_place": in_place})
        found = updated_in_place(exported.manifest.model_copy(update={"engine": engine}))
        sinks = len(exported.manifest.contract.sink_updates()) if in_place else 0
        assert len(found) == len(rings) + sinks


def test_a_plan_that_updates_nothing_in_place_is_written(exported, tmp_path, monkeypatch):
    # No builder of today makes one; the record of one that does would say so.
    monkeypatch.setattr(GraphContract, "ring_updates", lambda self: {})
    monkeypatch.setattr(GraphContract, "sink_updates", lambda self: {})
    out = export_triton(
        exported.path, tmp_path / "models", name="a", slots=1, backends=("tensorrt",)
    )
    assert (out / "a_tensorrt" / "1" / "model.plan").is_file()
    assert "NOT RUN" in (out / "README.md").read_text()


def test_a_plan_of_tensorrt_for_rtx_is_run_by_our_runtime(tmp_path):
    bundle = bundle_with_plan(tmp_path)[0]
    out = export_triton(bundle.path, tmp_path / "models", name="a", slots=1, backends=("tensorrt",))
    text = (out / "a_tensorrt" / "config.pbtxt").read_text()
    assert 'backend: "python"' in text
    assert "was built by tensorrt-rtx" in text


def test_parameters_that_no_model_of_the_repository_has_are_refused(
    exported, tmp_path, monkeypatch
):
    monkeypatch.setattr(GraphContract, "ring_updates", lambda self: {})
    monkeypatch.setattr(GraphContract, "sink_updates", lambda self: {})
    with pytest.raises(InputError, match="max_new_tokens: of the python backend"):
        export_triton(
            exported.path, tmp_path / "models", slots=1, backends=("tensorrt",),
            parameters={"max_new_tokens": "7"},
        )  # fmt: skip


@pytest.mark.parametrize("how", [{"parameters": OUR_RUNTIME}, {"backends": ("tensorrt",)}])
def test_a_plan_takes_no_more_slots_than_it_was_built_for(exported, tmp_path, how):
    with pytest.raises(InputError, match=r"slots=99: engine.plan takes at most \d"):
        export_triton(exported.path, tmp_path / "models", slots=99, **how)


def test_a_foreign_plan_is_written_after_somebody_vouched_for_it(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def export(**more):
        parameters = {**OUR_RUNTIME, **more}
        return export_triton(exported.path, tmp_path / "models", slots=1, parameters=parameters)

    with pytest.raises(InputError, match="is code, and this bundle was not exported here"):
        export()
    with pytest.raises(SessionError, match="is not the bundle of SHA-256"):
        export(trust_hash="0" * 64)
    assert not (tmp_path / "models").exists()
    assert export(trust_hash=exported.manifest.manifest_sha256).is_dir()


def test_the_graph_of_a_bundle_with_a_foreign_plan_needs_no_trust(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert export_triton(exported.path, tmp_path / "models").is_dir()


def test_a_plan_s_configuration_names_every_tensor(demo_lm):
    manifest = demo_lm.bundle.manifest
    text = tensorrt_config("plan", manifest, 4, "/models/plugin.so")
    for spec in (*manifest.contract.inputs(), *manifest.contract.outputs()):
        assert f'name: "{spec.name}"' in text
    assert "NOT RUN" in text
    assert "/models/plugin.so" in text
    assert "ring_" not in text
    # Triton refuses a tensor without dimensions; benchmarks/scaling/triton_run loads this one.
    assert "dims: [  ]" not in text
    for name in ("past_length", "new_length"):
        assert f'name: "{name}" data_type: TYPE_INT64 dims: [ 1 ] reshape: {{ shape: [ ] }}' in text


def test_a_plan_that_is_not_there_is_told_so(demo_lm, tmp_path):
    with pytest.raises(LminfError, match=r"bundle='bundle/engine.plan': expected bundle, which"):
        export_triton(demo_lm.bundle.path, tmp_path / "models", parameters=OUR_RUNTIME)
