"""A plan is code: it runs after its user agreed once, or made it."""

from __future__ import annotations

import os

import pytest
from click.testing import CliRunner

from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.manifest import Manifest
from lminf_export.bundle.trust import is_trusted, remember, require_trust, trusted_folder
from lminf_export.cli.main import cli
from lminf_export.errors import SessionError
from lminf_export.runtime.load import load
from tests.support.tensorrt_doubles import bundle_with_plan


@pytest.fixture
def exported(tmp_path):
    return bundle_with_plan(tmp_path, plugin="beside")[0]


@pytest.fixture
def foreign(exported, tmp_path, monkeypatch):
    """The bundle as it reaches a user who has never seen it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return exported


@pytest.fixture
def session(monkeypatch):
    """What was loaded, in the place of TensorRT."""
    loaded = []

    class Session:
        def __init__(self, bundle, **_):
            loaded.append(bundle.path)
            raise SessionError("needs an NVIDIA GPU")

    monkeypatch.setattr("lminf_export.runtime.tensorrt.TensorRTSession", Session)
    return loaded


def test_what_this_user_exported_needs_no_word(exported, session):
    assert is_trusted(exported.manifest)
    with pytest.raises(SessionError, match="GPU"):
        load(exported.plan_path)
    assert session == [exported.path]


def test_a_foreign_plan_is_not_loaded_until_it_is_trusted_once(foreign, session):
    with pytest.raises(SessionError, match=r"is code, and brings the library .*--trust-plan") as e:
        load(foreign.plan_path)
    assert len(str(e.value)) <= 300
    assert "\n" not in str(e.value)
    assert session == []
    for trust in (True, False):  # the second time nobody is asked
        with pytest.raises(SessionError, match="GPU"):
            load(foreign.plan_path, trust_plan=trust)
    assert len(session) == 2


def test_the_hash_of_the_manifest_vouches_and_any_other_does_not(foreign, session):
    plan = foreign.manifest.files["engine.plan"].sha256
    for other in ("0" * 64, plan, ""):  # the plan's alone says nothing of the library beside it
        with pytest.raises(SessionError, match="is not the bundle of SHA-256"):
            load(foreign.plan_path, trust_plan=other)
    assert session == []
    assert not is_trusted(foreign.manifest)
    with pytest.raises(SessionError, match="GPU"):
        load(foreign.plan_path, trust_plan=foreign.manifest.manifest_sha256.upper())
    assert is_trusted(foreign.manifest)


def test_a_plan_without_a_library_is_vouched_for_by_its_own_hash(tmp_path, monkeypatch):
    bundle, _ = bundle_with_plan(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with pytest.raises(SessionError, match="is code; its hash is no signature"):
        require_trust(bundle, False)
    require_trust(bundle, bundle.manifest.files["engine.plan"].sha256)


def test_the_graph_of_a_foreign_bundle_needs_no_trust(foreign):
    load(foreign.path, threads=1, kernels="none")


def test_another_plan_in_the_same_folder_is_asked_for_again(foreign):
    require_trust(foreign, True)
    draft = foreign.manifest.model_copy(update={"notices": ("another",)})
    assert not is_trusted(draft.sealed(dict(draft.files)))


def test_the_command_asks_once(foreign, session):
    words = ["generate", str(foreign.plan_path), "--prompt", "x"]
    first = CliRunner().invoke(cli, words)
    assert first.exit_code == 2
    assert "--trust-plan" in first.stderr
    assert len(first.stderr.splitlines()) == 1
    assert "is not the bundle" in CliRunner().invoke(cli, [*words, "--trust-hash", "12"]).stderr
    assert session == []
    digest = foreign.manifest.manifest_sha256
    assert "GPU" in CliRunner().invoke(cli, [*words, "--trust-hash", digest]).stderr
    assert "GPU" in CliRunner().invoke(cli, words).stderr


def test_a_folder_that_others_can_write_counts_for_nothing(foreign):
    remember(foreign.manifest)
    assert is_trusted(foreign.manifest)
    trusted_folder().chmod(0o777)
    assert not is_trusted(foreign.manifest)


@pytest.mark.parametrize("home", [True, False])
def test_without_a_place_to_remember_trust_lasts_for_the_process(
    foreign, monkeypatch, tmp_path, home
):
    monkeypatch.setattr("lminf_export.bundle.trust._agreed", set())
    if home:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("XDG_CONFIG_HOME")
        monkeypatch.setattr(
            "pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("none"))
        )
        assert trusted_folder() is None
    with pytest.raises(SessionError, match="is code"):
        require_trust(foreign, False)
    require_trust(foreign, True)
    require_trust(foreign, False)


@pytest.mark.parametrize(
    "words",
    [
        ("validate",),
        ("eval", "passkey", "--trials", "1"),
        ("eval", "lookup", "--trials", "1"),
        ("eval", "generate"),
    ],
)
def test_other_commands_ask_too(foreign, session, words):
    command = [*words, str(foreign.plan_path)]
    asked = CliRunner().invoke(cli, command)
    assert asked.exit_code == 2
    assert "is code, and brings" in asked.stderr
    wrong = CliRunner().invoke(cli, [*command, "--trust-hash", "00"])
    assert wrong.exit_code == 2
    assert "is not the bundle of SHA-256" in wrong.stderr
    assert session == []
    CliRunner().invoke(cli, [*command, "--trust-plan"])
    assert session == [foreign.path]


def test_a_bundle_without_an_engine_is_not_remembered(foreign):
    plain: Manifest = foreign.manifest.model_copy(update={"engine": None})
    remember(plain)
    folder = trusted_folder()
    assert not folder.exists() or os.listdir(folder) == []
    assert Bundle.open(foreign.path).manifest == foreign.manifest
